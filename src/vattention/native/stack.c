/* All decoder layers of a model and the norm behind them, in one call and in one parallel region. */
#include "kernels.h"
#include "team.h"

#include <string.h>

/* A layer with its share of the cache. */
typedef struct {
    const vattention_layer *layer;
    const vattention_cache *keys, *values;
    const vattention_tables *tables;
    int64_t rotary; /* which cosines and sines it takes */
} vattention_stacked;

/* Cosines and sines of all positions so far, [positions, head_dim] each. */
typedef struct {
    const void *cosines, *sines;
} vattention_rotary;

typedef struct {
    const vattention_rotary *tables;
    int64_t num_tables, row_nbytes;
} vattention_rotaries;

typedef struct {
    const vattention_stacked *layers;
    int64_t num_layers;
    const vattention_norm *last;
    const vattention_batch *batch;
    const char *rows; /* of the batch's tokens: of each table cosines, then sines */
    int64_t rows_nbytes;
    void *x;
    int32_t num_threads, status;
} job;

static void forward(void *argument) {
    job *j = argument;
    for (int64_t i = 0; j->status == 0 && i < j->num_layers; i++) {
        const vattention_stacked *own = &j->layers[i];
        const char *cosines = j->rows + 2 * own->rotary * j->rows_nbytes;
        vattention_batch batch = *j->batch;
        batch.num_wanted = i == j->num_layers - 1 ? batch.num_wanted : -1;
        j->status =
            vattention_layer_forward(own->layer, own->keys, own->values, own->tables, &batch, cosines,
                                     cosines + j->rows_nbytes, j->x, j->num_threads, team_parallel);
    }
    const vattention_layer *any = j->layers[0].layer;
    const int64_t num_rows = j->batch->num_wanted < 0 ? j->batch->num_tokens : j->batch->num_wanted;
    vattention_rms_norm(j->x, j->last->scale, j->x, num_rows, any->hidden, j->last->epsilon, any->dtype,
                        j->num_threads, team_parallel);
}

/* Bytes of a batch's rows of one table's cosines, or sines, in whole cache lines. */
static int64_t rows_nbytes(const vattention_rotaries *rotaries, const vattention_batch *batch) {
    return (batch->num_tokens * rotaries->row_nbytes + 63) / 64 * 64;
}

/* A table's rows for the tokens of spans. */
static void look_up(const void *table, int64_t row_nbytes, const vattention_span *spans, int64_t num_spans, char *rows) {
    for (int64_t i = 0; i < num_spans; i++) {
        const char *from = (const char *)table + spans[i].start * row_nbytes;
        memcpy(rows + spans[i].first_row * row_nbytes, from, (size_t)(spans[i].num_rows * row_nbytes));
    }
}

/* Bytes of workspace for a batch. */
int64_t vattention_stack_nbytes(const vattention_stacked *layers, int64_t num_layers,
                                const vattention_rotaries *rotaries, const vattention_batch *batch,
                                int32_t num_threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < num_layers; i++) {
        const int64_t nbytes = vattention_layer_nbytes(layers[i].layer, batch, num_threads);
        most = nbytes > most ? nbytes : most;
    }
    return most + 2 * rotaries->num_tables * rows_nbytes(rotaries, batch);
}

/* x[num_tokens, hidden] through the layers and the norm, in place; the rows that are wanted come first
 * then. Returns 0, or -1 where memory ran short. */
int32_t vattention_stack_forward(const vattention_stacked *layers, int64_t num_layers, const vattention_norm *last,
                                 const vattention_batch *batch, const vattention_rotaries *rotaries, void *x,
                                 int32_t num_threads, parallel_fn parallel) {
    const int64_t own_nbytes = rows_nbytes(rotaries, batch), row_nbytes = rotaries->row_nbytes;
    char *rows = batch->workspace, *behind = rows;
    for (int64_t i = 0; i < 2 * rotaries->num_tables; i++, behind += own_nbytes) {
        const vattention_rotary *table = &rotaries->tables[i / 2];
        const void *numbers = i % 2 ? table->sines : table->cosines;
        look_up(numbers, row_nbytes, batch->short_spans, batch->num_short, behind);
        look_up(numbers, row_nbytes, batch->long_spans, batch->num_long, behind);
    }
    vattention_batch inner = *batch;
    inner.workspace = behind;
    job j = {layers, num_layers, last, &inner, rows, own_nbytes, x, num_threads, 0};
    team_run(forward, &j, num_threads, parallel);
    return j.status;
}
