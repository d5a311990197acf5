/* What the kernels take, and the kernels, which say beside their code what they compute. */
#ifndef VATTENTION_KERNELS_H
#define VATTENTION_KERNELS_H

#include "common.h"

/* Packed weights are panels of this many output columns, two vectors of 16 numbers. */
enum { COLUMNS = 32, HALF = 16 };
/* Steps of the inner dimension that a matrix tile takes at a time. */
enum { TILE_STEPS = 32 };
/* Bytes between what is multiplied and what is fetched: far enough for memory's latency at its full speed. */
enum { AHEAD = 1024 };

/* The activation x sigmoid(x (linear + cubic x^2)) of a gated linear unit. */
typedef struct {
    float linear, cubic;
} vattention_gating;

/* Forms of a weight: numbers of its type, or quantized. */
enum { PLAIN = 0, INT8 = 1, INT4 = 2, HALVES = 3 };
/* Steps of the inner dimension whose quantized numbers share a scale, and bytes of a line of such numbers. */
enum { GROUP = 32, LINE = 64 };
/* Bytes of the upper, or the lower, halves of a group's numbers in a panel, and of the upper ones with their scales. */
enum { HALVES_NBYTES = COLUMNS * GROUP / 2, UPPER_NBYTES = 2 * COLUMNS + HALVES_NBYTES };

/* A linear layer's weight, packed as linear.c or quantized.c describes it. */
typedef struct {
    const void *packed;
    const float *bias; /* or NULL */
    int64_t num_out;
    int64_t num_in;
    int32_t dtype; /* of x, and of a plain weight */
    int32_t format;
} vattention_weight;

/* A weight's copy in 8 bits, as screen_bytes.c describes it, and what its products may be off by. */
typedef struct {
    int8_t *numbers;
    float *scales; /* of a column's numbers */
    float *errors; /* a product's largest, relative to the length of x; two of each column in screen_halves.c */
    int32_t *sums; /* of a column's numbers */
    int64_t num_out;
    int64_t num_steps; /* a multiple of 16 */
} vattention_screen;

/* Gumbel noise on a row of numbers, as gumbel.h describes it. */
typedef struct {
    uint64_t key;
    float temperature; /* or 0 for none */
} vattention_noise;

/* What a layer's attention computes. */
typedef struct {
    int64_t num_heads, num_kv_heads, key_dim, value_dim;
    int64_t window; /* or 0 */
    int64_t strip;  /* keys in a strip: a multiple of 16, at most 128 */
    float scale;
    float softcap; /* or 0 */
} vattention_heads;

/* The first key that the token at a position sees. */
INLINE int64_t first_key(const vattention_heads *heads, int64_t position) {
    return heads->window > 0 && position >= heads->window ? position - heads->window + 1 : 0;
}

/* Keys or values, with strides in elements. */
typedef struct {
    const void *numbers;
    int64_t slot_stride; /* of a block, where there are blocks */
    int64_t token_stride, head_stride;
} vattention_cache;

/* Blocks of a slot's tokens: entry [slot, i] has its tokens [i block_size, (i + 1) block_size). */
typedef struct {
    const int32_t *blocks;
    int64_t slot_stride;
    int64_t block_size; /* or 0: slots are contiguous */
} vattention_tables;

/* Heads that lie side by side. */
typedef struct {
    const float *scale; /* head_dim numbers, or NULL for no norm */
    float epsilon;
    int32_t num_heads;
} vattention_normed_heads;

/* What a token's queries and keys look like. */
typedef struct {
    vattention_normed_heads query, key;
    int64_t head_dim;
    int64_t width; /* of a token, with the values behind its keys */
    int32_t dtype;
} vattention_rotation;

/* The numbers that 4 bits stand for, before they are scaled. */
extern const int8_t vattention_code_book[16];

int64_t vattention_panel_nbytes(const vattention_weight *weight);

/* Where a panel's lower halves are, in the format that has them. */
const char *vattention_lower_halves(const vattention_weight *weight, int64_t panel);

/* A quantized panel as one of float32, or on processors that multiply those of bfloat16, as linear.c describes it; with
 * zeros up to a whole group. */
void vattention_unpack(const vattention_weight *weight, int64_t panel, int32_t dtype, void *out);

/* A root mean square norm. */
typedef struct {
    const float *scale; /* [hidden], or NULL for no norm */
    float epsilon;
} vattention_norm;

typedef struct {
    const vattention_weight *query_key_value, *attention_out, *gate_up, *down;
    const vattention_rotation *rotation;
    const vattention_heads *heads;
    vattention_norm before_attention, after_attention, before_mlp, after_mlp;
    vattention_gating gating;
    int64_t hidden;
    int32_t dtype;
} vattention_layer;

/* A sequence's share of a batch: its rows [first_row, first_row + num_rows) are the tokens at positions [start, ...). */
typedef struct {
    int64_t slot, first_row, num_rows, start;
} vattention_span;

/* A batch: the spans of one row and those of more, each in the order of their rows; where the layers work; and the rows
 * that somebody wants to see in the end, in ascending order, or -1 of them for all. */
typedef struct {
    int64_t num_tokens;
    const vattention_span *short_spans, *long_spans;
    int64_t num_short, num_long;
    const int64_t *wanted;
    int64_t num_wanted;
    void *workspace; /* from a cache line on, of as many bytes as `vattention_layer_nbytes` says */
} vattention_batch;

int32_t vattention_linear(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows, void *y,
                          int32_t y_dtype, int32_t num_threads, parallel_fn parallel);

/* Rows from which on arithmetic takes longer than reading a weight. */
enum { TALL = 128 };

int vattention_can_tall(const vattention_weight *weight);

int64_t vattention_tall_nbytes(const vattention_weight *weight, int64_t num_rows, int gated, int32_t num_threads);

void vattention_tall(const vattention_weight *weight, const void *x, int64_t x_stride, int64_t num_rows, void *y,
                     int32_t y_dtype, const vattention_gating *gating, void *workspace, int32_t num_threads,
                     parallel_fn parallel);

int32_t vattention_largest(const vattention_weight *weight, const int32_t *panels, int64_t num_panels, const void *x,
                           int64_t x_stride, int64_t num_rows, const vattention_noise *noise, int64_t *columns,
                           float *values, int32_t num_threads, parallel_fn parallel);

/* Which instructions multiply bfloat16 here: 0 none, 1 pairs, 2 matrix tiles. A thread that uses those itself begins,
 * for so many rows of at most 32, and ends. */
int vattention_has_tiles(void);
void vattention_tiles_begin(int64_t rows);
void vattention_tiles_end(void);

void vattention_rms_norm(const void *x, const float *scale, void *y, int64_t num_rows, int64_t width, float epsilon,
                         int32_t dtype, int32_t num_threads, parallel_fn parallel);

void vattention_join(const vattention_norm *norm, void *y, void *sum, int64_t num_rows, int64_t width, int32_t dtype,
                     int32_t num_threads, parallel_fn parallel);

void vattention_rotate(const vattention_rotation *shape, void *x, const void *cosines, const void *sines,
                       int64_t num_tokens, int32_t num_threads, parallel_fn parallel);

void vattention_gate(const void *gate_up, void *y, int64_t num_rows, int64_t width, float linear, float cubic,
                     int32_t dtype, int32_t num_threads, parallel_fn parallel);

int32_t vattention_attend(const vattention_heads *heads, const vattention_cache *keys, const vattention_cache *values,
                          const vattention_tables *tables, int32_t dtype, const void *query, int64_t query_row_stride,
                          int64_t query_head_stride, const vattention_span *spans, int64_t num_spans, const float *sinks,
                          void *output, int32_t num_threads, parallel_fn parallel);

int vattention_can_prefill(const vattention_heads *heads, int32_t dtype);

int64_t vattention_prefill_nbytes(const vattention_heads *heads, const vattention_span *spans, int64_t num_spans,
                                  int32_t num_threads);

void vattention_prefill(const vattention_heads *heads, const vattention_cache *keys, const vattention_cache *values,
                        const vattention_tables *tables, const void *query, int64_t query_row_stride,
                        int64_t query_head_stride, const vattention_span *spans, int64_t num_spans, void *output,
                        void *workspace, int32_t num_threads, parallel_fn parallel);

void vattention_append(const vattention_layer *layer, const vattention_cache *keys, const vattention_cache *values,
                       const vattention_tables *tables, const vattention_span *span, const void *rows);

int64_t vattention_narrow_nbytes(const vattention_batch *batch);

void vattention_narrow(vattention_batch *batch, void *spans, void *rows, int64_t row_nbytes, void *x, int64_t x_nbytes);

int vattention_layer_is_tall(const vattention_layer *layer, int64_t num_rows, int32_t num_threads);

int64_t vattention_layer_tall_nbytes(const vattention_layer *layer, int64_t num_rows, int32_t num_threads);

void vattention_layer_tall_before(const vattention_layer *layer, const vattention_cache *keys,
                                  const vattention_cache *values, const vattention_tables *tables,
                                  const vattention_batch *batch, const void *cosines, const void *sines, void *x,
                                  void *rows, void *workspace, int32_t num_threads, parallel_fn parallel);

void vattention_layer_tall_behind(const vattention_layer *layer, void *attended, int64_t num_rows, void *x,
                                  void *workspace, int32_t num_threads, parallel_fn parallel);

int64_t vattention_layer_nbytes(const vattention_layer *layer, const vattention_batch *batch, int32_t num_threads);

int32_t vattention_layer_forward(const vattention_layer *layer, const vattention_cache *keys,
                                 const vattention_cache *values, const vattention_tables *tables,
                                 const vattention_batch *batch, const void *cosines, const void *sines, void *x,
                                 int32_t num_threads, parallel_fn parallel);

#endif
