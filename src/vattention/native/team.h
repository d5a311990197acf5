/* Threads that stay together through many short parallel sections. */
#ifndef VATTENTION_TEAM_H
#define VATTENTION_TEAM_H

#include "common.h"

/* Runs `leader` on this thread, with the others of a parallel region waiting for the sections that it begins by
 * `team_parallel`. */
void team_run(void (*leader)(void *), void *argument, int32_t num_threads, parallel_fn parallel);

/* A parallel section of the team that this thread leads: `body` runs here and on those of the other threads that come
 * while it does. It must take its work from where all of them do, for it may be alone. */
void team_parallel(void (*body)(void *), void *argument, unsigned num_threads, unsigned flags);

#endif
