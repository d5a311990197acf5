/* A fork and join of OpenMP's takes microseconds, and all threads must have come before anybody goes on: one whose
 * processor another process holds makes the others wait for the rest of a time slice, in each section. Here threads meet
 * in one region for a whole forward pass. A section is open while its leader works on it; who comes too late for it
 * waits for the next.
 */
#define _GNU_SOURCE
#include "team.h"

#include <sched.h>
#include <stddef.h>

/* A section's number, whether it is open, and how many entered it, in one word that changes at once. */
enum { OPEN = 1 << 16, ENTERED = OPEN - 1, ENDED = 1 << 17 };
enum { NUMBER_SHIFT = 32 };

/* Looks at the word before the processor is offered to others. */
enum { PATIENCE = 1 << 12 };

typedef struct {
    void (*leader)(void *);
    void *leader_argument;
    const void *leads; /* the leader's own, for it to be known by */
    uint64_t section __attribute__((aligned(64)));
    void (*body)(void *);
    void *argument;
    uint64_t left __attribute__((aligned(64))); /* who entered and has left again */
} team;

static _Thread_local team *led;

INLINE void wait_a_little(int64_t *looks) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
    if (++*looks % PATIENCE == 0) {
        sched_yield();
    }
}

static void follow(team *t) {
    uint64_t last = 0;
    int64_t looks = 0;
    for (;;) {
        uint64_t now = __atomic_load_n(&t->section, __ATOMIC_ACQUIRE);
        if (now & ENDED) {
            return;
        }
        if (!(now & OPEN) || now >> NUMBER_SHIFT == last ||
            !__atomic_compare_exchange_n(&t->section, &now, now + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            wait_a_little(&looks);
            continue;
        }
        last = now >> NUMBER_SHIFT;
        looks = 0;
        t->body(t->argument);
        __atomic_fetch_add(&t->left, 1, __ATOMIC_RELEASE);
    }
}

static void member(void *argument) {
    team *t = argument;
    if (t->leads != &led) {
        follow(t);
        return;
    }
    team *const before = led;
    led = t;
    t->leader(t->leader_argument);
    led = before;
    __atomic_store_n(&t->section, ENDED, __ATOMIC_RELEASE);
}

void team_run(void (*leader)(void *), void *argument, int32_t num_threads, parallel_fn parallel) {
    team t = {.leader = leader, .leader_argument = argument, .leads = &led};
    if (num_threads == 1) {
        member(&t);
    } else {
        parallel(member, &t, (unsigned)num_threads, 0);
    }
}

void team_parallel(void (*body)(void *), void *argument, unsigned num_threads, unsigned flags) {
    (void)num_threads;
    (void)flags;
    team *t = led;
    const uint64_t number = (__atomic_load_n(&t->section, __ATOMIC_RELAXED) >> NUMBER_SHIFT) + 1;
    t->body = body;
    t->argument = argument;
    t->left = 0;
    __atomic_store_n(&t->section, number << NUMBER_SHIFT | OPEN, __ATOMIC_RELEASE);
    body(argument);
    const uint64_t closed = __atomic_and_fetch(&t->section, ~(uint64_t)OPEN, __ATOMIC_ACQ_REL);
    int64_t looks = 0;
    while (__atomic_load_n(&t->left, __ATOMIC_ACQUIRE) < (closed & ENTERED)) {
        wait_a_little(&looks);
    }
}
