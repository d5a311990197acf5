/* The likeliest tokens of a large vocabulary for half the memory traffic, and for sure.
 *
 * One greedy token needs the largest of some 100,000 products with the output layer's weight, and reading that is most
 * of a small model's step. A copy of the weight in 8 bits gives each product up to an error that is known: by Cauchy
 * and Schwarz at most |w - copy| |x|. Only panels in which some upper bound reaches the largest lower bound are
 * then computed from the weight itself, so the result is that of computing all.
 *
 * screen_bytes.c has the copy of a weight in bfloat16; of one that lies in halves a part is one (screen_halves.c).
 */
#include "screen.h"

#include <stdlib.h>
#include <string.h>

#ifdef HAVE_SCREEN
static const screen_kind *kind_of(const vattention_weight *weight) {
    return weight->format == HALVES ? &vattention_halves : &vattention_bytes;
}

SCREEN_TARGET static void work(void *argument) {
    screening *j = argument;
    const int tiles = vattention_has_tiles() == 2 && j->kind->by_tiles;
    const int64_t together = tiles ? TILE_TOKENS : VECTOR_TOKENS;
    float *lower = j->lower + j->num_rows * __atomic_fetch_add(&j->next_thread, 1, __ATOMIC_RELAXED);
    if (tiles) {
        vattention_tiles_begin(COLUMNS);
    }
    for (;;) {
        const int64_t begin = j->panels_each * __atomic_fetch_add(&j->next_item, 1, __ATOMIC_RELAXED);
        if (begin >= j->num_panels) {
            break;
        }
        for (int64_t panel = begin; panel < begin + j->panels_each && panel < j->num_panels; panel++) {
            for (int64_t first = 0; first < j->num_rows; first += together) {
                const int64_t count = j->num_rows - first < together ? j->num_rows - first : together;
                (tiles ? j->kind->by_tiles : j->kind->by_vectors)(j, first, count, panel, lower);
            }
        }
    }
    if (tiles) {
        vattention_tiles_end();
    }
}

/* Candidates are worth looking at one by one as long as they are fewer than one panel in so many. */
enum { WORTHWHILE = 3 };

/* All rows; 0 where a number of theirs is of no use for bounds. */
static int split_rows(const screening *s, const uint16_t *x, int64_t x_stride, int8_t *rows, screen_group *groups) {
    const int64_t num_in = s->weight->num_in, width = s->screen->num_steps * STEP;
    const int64_t each = s->kind->group ? s->kind->group : width;
    for (int64_t m = 0; m < s->num_rows; m++, x += x_stride, rows += s->kind->num_bytes * width) {
        for (int64_t k = 0; k < num_in; k += each) {
            const int64_t count = num_in - k < each ? num_in - k : each;
            if (!s->kind->split(x + k, count, rows + k, width, groups++)) {
                return 0;
            }
        }
    }
    return 1;
}

/* The panels in which some row's largest number may be, in ascending order: `found`, the number of them.
 *
 * A row's number in the panel of its largest upper bound is known exactly before; panels with upper bounds below it are
 * none of them. Returns -1 where memory ran short. */
static int64_t find(const screening *s, const void *x, int64_t x_stride, int64_t *columns, float *values, int32_t *found,
                    int32_t num_threads, parallel_fn parallel) {
    int64_t num_found = 0;
    memset(found, 0, (size_t)s->num_panels * sizeof(*found));
    for (int64_t m = 0; m < s->num_rows; m++) {
        const float *upper = s->upper + m * s->num_panels;
        int64_t most = 0;
        for (int64_t panel = 1; panel < s->num_panels; panel++) {
            most = upper[panel] > upper[most] ? panel : most;
        }
        found[most] = 1;
    }
    for (int64_t panel = 0; panel < s->num_panels; panel++) {
        const int32_t own = found[panel];
        found[num_found] = (int32_t)panel;
        num_found += own;
    }
    if (vattention_largest(s->weight, found, num_found, x, x_stride, s->num_rows, s->noise, columns, values,
                            num_threads, parallel)) {
        return -1;
    }
    num_found = 0;
    for (int64_t panel = 0; panel < s->num_panels; panel++) {
        int reaches = 0;
        for (int64_t m = 0; m < s->num_rows; m++) {
            reaches |= !(s->upper[m * s->num_panels + panel] < values[m]);
        }
        found[num_found] = (int32_t)panel;
        num_found += reaches;
    }
    return num_found;
}
#endif

/* Whether this processor can do it. */
int32_t vattention_can_screen(void) {
#ifdef HAVE_SCREEN
    return has_bytes();
#else
    return 0;
#endif
}

/* Fills in the screen of a weight: bfloat16's copy, or what is known of one in halves. Returns 0, or -1 where a number of
 * the weight is too large or none. */
int32_t vattention_screen_pack(const vattention_screen *screen, const vattention_weight *weight, int32_t num_threads,
                               parallel_fn parallel) {
#ifdef HAVE_SCREEN
    screen_pack_job j = {.weight = weight, .screen = screen};
    parallel(kind_of(weight)->pack, &j, (unsigned)num_threads, 0);
    return j.bad ? -1 : 0;
#else
    (void)screen, (void)weight, (void)num_threads, (void)parallel;
    return -1;
#endif
}

/* The same as `vattention_largest` of the weight that the screen was made from, without a bias. Returns 1 where so many
 * candidates were left that everything was computed. */
int32_t vattention_screened_largest(const vattention_screen *screen, const vattention_weight *weight, const void *x,
                                    int64_t x_stride, int64_t num_rows, const vattention_noise *noise,
                                    int64_t *columns, float *values, int32_t num_threads, parallel_fn parallel) {
    const int32_t *candidates = NULL;
    int64_t num_candidates = 0;
    (void)screen;
#ifdef HAVE_SCREEN
    const int64_t width = screen->num_steps * STEP, num_panels = (screen->num_out + COLUMNS - 1) / COLUMNS;
    screening s = {.screen = screen, .weight = weight, .noise = noise, .num_rows = num_rows};
    s.num_panels = num_panels;
    s.kind = kind_of(weight);
    s.num_groups = s.kind->group ? (weight->num_in + s.kind->group - 1) / s.kind->group : 1;
    s.panels_each = num_panels / (16 * num_threads) + 1;
    /* Matrix tiles read whole tiles of rows. */
    const int64_t rows_nbytes = (2 * num_rows + 31) / 32 * 32 * width;
    const int64_t groups_nbytes = num_rows * s.num_groups * (int64_t)sizeof(screen_group);
    const int64_t nbytes = rows_nbytes + groups_nbytes +
                           ((num_rows + 1) * num_panels + num_rows * num_threads) * (int64_t)sizeof(float);
    char *memory = aligned_alloc(64, (size_t)(nbytes + 63) / 64 * 64);
    if (memory == NULL) {
        return -1;
    }
    int8_t *rows = (int8_t *)memory;
    screen_group *groups = (screen_group *)(memory + rows_nbytes);
    int32_t *found = (int32_t *)(memory + rows_nbytes + groups_nbytes);
    s.rows = rows;
    s.groups = groups;
    s.upper = (float *)(found + num_panels);
    s.lower = s.upper + num_rows * num_panels;
    memset(rows, 0, (size_t)rows_nbytes);
    for (int64_t i = 0; i < num_threads * num_rows; i++) {
        s.lower[i] = -INFINITY;
    }
    if (split_rows(&s, x, x_stride, rows, groups)) {
        if (num_threads == 1) {
            work(&s);
        } else {
            parallel(work, &s, (unsigned)num_threads, 0);
        }
        num_candidates = find(&s, x, x_stride, columns, values, found, num_threads, parallel);
        candidates = num_candidates < num_panels / WORTHWHILE ? found : NULL;
    }
    if (num_candidates < 0) {
        free(memory);
        return -1;
    }
#endif
    const int32_t status = vattention_largest(weight, candidates, num_candidates, x, x_stride, num_rows, noise, columns,
                                              values, num_threads, parallel);
#ifdef HAVE_SCREEN
    free(memory);
#endif
    return status == 0 && candidates == NULL ? 1 : status;
}
