/* All decoder layers of a model and the norm behind them, in one call and in one parallel region. */
#include "kernels.h"
#include "team.h"

/* A layer with its share of the cache. */
typedef struct {
    const vattention_layer *layer;
    const vattention_cache *keys, *values;
    const vattention_tables *tables;
    int64_t rotary; /* which cosines and sines it takes */
} vattention_stacked;

/* [num_tokens, head_dim] each. */
typedef struct {
    const void *cosines, *sines;
} vattention_rotary;

typedef struct {
    const vattention_stacked *layers;
    int64_t num_layers;
    const vattention_norm *last;
    const vattention_batch *batch;
    const vattention_rotary *rotaries;
    void *x;
    int32_t num_threads, status;
} job;

static void forward(void *argument) {
    job *j = argument;
    for (int64_t i = 0; j->status == 0 && i < j->num_layers; i++) {
        const vattention_stacked *own = &j->layers[i];
        const vattention_rotary *rotary = &j->rotaries[own->rotary];
        vattention_batch batch = *j->batch;
        batch.num_wanted = i == j->num_layers - 1 ? batch.num_wanted : -1;
        j->status = vattention_layer_forward(own->layer, own->keys, own->values, own->tables, &batch,
                                             rotary->cosines, rotary->sines, j->x, j->num_threads, team_parallel);
    }
    const vattention_layer *any = j->layers[0].layer;
    const int64_t num_rows = j->batch->num_wanted < 0 ? j->batch->num_tokens : j->batch->num_wanted;
    vattention_rms_norm(j->x, j->last->scale, j->x, num_rows, any->hidden, j->last->epsilon, any->dtype,
                        j->num_threads, team_parallel);
}

/* Bytes of workspace for a batch. */
int64_t vattention_stack_nbytes(const vattention_stacked *layers, int64_t num_layers, const vattention_batch *batch,
                                int32_t num_threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < num_layers; i++) {
        const int64_t nbytes = vattention_layer_nbytes(layers[i].layer, batch, num_threads);
        most = nbytes > most ? nbytes : most;
    }
    return most;
}

/* x[num_tokens, hidden] through the layers and the norm, in place; the rows that are wanted come first
 * then. Returns 0, or -1 where memory ran short. */
int32_t vattention_stack_forward(const vattention_stacked *layers, int64_t num_layers, const vattention_norm *last,
                                 const vattention_batch *batch, const vattention_rotary *rotaries, void *x,
                                 int32_t num_threads, parallel_fn parallel) {
    job j = {layers, num_layers, last, batch, rotaries, x, num_threads, 0};
    team_run(forward, &j, num_threads, parallel);
    return j.status;
}
