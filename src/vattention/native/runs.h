/* Items of a parallel section, in runs: each thread takes those of one run in their order, for memory that is read in
 * one piece is read faster, and then helps with the others. */
#ifndef VATTENTION_RUNS_H
#define VATTENTION_RUNS_H

#include "common.h"

/* More threads than this share runs. */
enum { MOST_RUNS = 16 };

/* On a cache line of its own, for its thread to take from alone. */
typedef struct {
    int64_t next __attribute__((aligned(64))), end;
} item_run;

typedef struct {
    item_run runs[MOST_RUNS];
    int64_t num_runs, next_thread; /* taken atomically */
} items;

/* A thread's view: who it is among the threads that came, and how many runs it has gone through. */
typedef struct {
    int64_t thread, num_done;
} item_taker;

INLINE void items_begin(items *all, int64_t num_items, int32_t num_threads) {
    all->num_runs = num_threads < MOST_RUNS ? num_threads : MOST_RUNS;
    all->next_thread = 0;
    for (int64_t i = 0; i < all->num_runs; i++) {
        all->runs[i].next = num_items * i / all->num_runs;
        all->runs[i].end = num_items * (i + 1) / all->num_runs;
    }
}

INLINE item_taker items_join(items *all) {
    return (item_taker){.thread = __atomic_fetch_add(&all->next_thread, 1, __ATOMIC_RELAXED)};
}

/* The item that the thread takes next, if nobody is faster; or -1. */
INLINE int64_t items_foresee(const items *all, const item_taker *taker) {
    const item_run *run = &all->runs[taker->thread % all->num_runs];
    const int64_t item = __atomic_load_n(&run->next, __ATOMIC_RELAXED);
    return item < run->end ? item : -1;
}

/* An item that nobody else gets, or -1 when there are no more. */
INLINE int64_t items_take(items *all, item_taker *taker) {
    for (; taker->num_done < all->num_runs; taker->num_done++) {
        item_run *run = &all->runs[(taker->thread + taker->num_done) % all->num_runs];
        const int64_t item = __atomic_fetch_add(&run->next, 1, __ATOMIC_RELAXED);
        if (item < run->end) {
            return item;
        }
    }
    return -1;
}

#endif
