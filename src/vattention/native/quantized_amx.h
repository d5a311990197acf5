/* A batch of decodes times a quantized panel by matrix tiles of bytes (AMX); included by linear_sets.h.
 *
 * x is taken as quantized_few.h has it. Of each group tiles make 16 rows' sums for the upper and the lower bytes, which
 * vectors put together and scale while the tiles are at the next group.
 */
#define AMX_BYTES_TARGET \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

enum { BATCH_ROWS = 16 };

/* Tiles 0 and 1 are sums of upper bytes for the two halves of a panel, 2 and 3 of lower ones; 4 and 5 the rows' upper
 * and lower bytes, 6 and 7 the halves of a group. */
AMX_BYTES_TARGET static void batch_begin(int64_t rows) {
    amx_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = (uint8_t)(i < 6 ? rows : GROUP / 4);
        config.row_nbytes[i] = i == 4 || i == 5 ? GROUP : LINE;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

/* What the tiles summed for one group, put together and added to sums. */
AMX_BYTES_TARGET INLINE void batch_add(const few_group *x, int64_t stride, int64_t rows, const char *group,
                                       const int32_t *tiles, float *sums) {
    __m512 scales[2];
    for (int half = 0; half < 2; half++) {
        const __m256i own = _mm256_loadu_si256((const __m256i *)(group + half * HALF * 2));
        scales[half] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(own), 16));
    }
    for (int64_t m = 0; m < rows; m++, tiles += HALF, sums += COLUMNS) {
        const __m512 factor = _mm512_set1_ps(x[m * stride].factor);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512i high = _mm512_load_si512(tiles + half * BATCH_ROWS * HALF);
            const __m512i low = _mm512_load_si512(tiles + (2 + half) * BATCH_ROWS * HALF);
            const __m512 whole = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
            const __m512 before = _mm512_load_ps(sums + half * HALF);
            _mm512_store_ps(sums + half * HALF, _mm512_fmadd_ps(whole, _mm512_mul_ps(scales[half], factor), before));
        }
    }
}

/* A group's numbers as bytes, [2, 8, 64], from its halves. */
AMX_BYTES_TARGET INLINE void batch_join(const char *line, const char *lower_line, int8_t *numbers) {
    const __m512i raised = _mm512_set1_epi8((char)0x80);
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / 4; i++, line += LINE, lower_line += LINE) {
        const __m512i upper = _mm512_loadu_si512(line), lower = _mm512_loadu_si512(lower_line);
        int8_t *to = numbers + i % 2 * (GROUP / 4) * LINE + i / 2 * 2 * LINE;
        _mm512_store_si512(to, _mm512_xor_si512(first_halves(upper, lower), raised));
        _mm512_store_si512(to + LINE, _mm512_xor_si512(second_halves(upper, lower), raised));
    }
}

/* The same from codes. */
AMX_BYTES_TARGET INLINE void batch_translate(const char *line, int8_t *numbers) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)vattention_code_book)), four = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int i = 0; i < GROUP / 4; i++, line += LINE) {
        const __m512i own = _mm512_loadu_si512(line);
        int8_t *to = numbers + i % 2 * (GROUP / 4) * LINE + i / 2 * 2 * LINE;
        _mm512_store_si512(to, _mm512_shuffle_epi8(table, _mm512_and_si512(own, four)));
        _mm512_store_si512(to + LINE, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(own, 4), four)));
    }
}

/* A group of a panel whose numbers do not lie as bytes. */
AMX_BYTES_TARGET INLINE void batch_numbers(const tile_args *args, int64_t group, const int format, int8_t *numbers) {
    const char *line = (const char *)args->panel + group * UPPER_NBYTES + 2 * COLUMNS;
    if (format == INT4) {
        batch_translate(line, numbers);
    } else {
        batch_join(line, args->lower + group * HALVES_NBYTES, numbers);
    }
}

/* `format` is a constant wherever this is inlined. */
AMX_BYTES_TARGET INLINE void batch_tile(const tile_args *args, const int format) {
    float sums[BATCH_ROWS * COLUMNS] __attribute__((aligned(64))) = {0};
    int32_t tiles[2][4 * BATCH_ROWS * HALF] __attribute__((aligned(64)));
    int8_t numbers[2][COLUMNS * GROUP] __attribute__((aligned(64)));
    const int64_t num_groups = (args->num_in + GROUP - 1) / GROUP, stride = num_groups * (int64_t)sizeof(few_group);
    const int64_t nbytes = 2 * COLUMNS + COLUMNS * GROUP / (format == INT8 ? 1 : 2);
    const few_group *x = (const few_group *)args->widened;
    const char *group = args->panel;
    if (format != INT8) {
        batch_numbers(args, 0, format, numbers[0]);
    }
    for (int64_t g = 0; g < num_groups; g++, group += nbytes) {
        if (args->first) {
            for (int64_t line = 0; line < nbytes; line += LINE) {
                __builtin_prefetch(group + FEW_AHEAD + line, 0, 3);
            }
            for (int64_t line = 0; format == HALVES && line < HALVES_NBYTES; line += LINE) {
                __builtin_prefetch(args->lower + g * HALVES_NBYTES + FEW_AHEAD + line, 0, 3);
            }
        }
        int32_t *own = tiles[g % 2];
        TILES_READ_MEMORY;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, x[g].high, stride);
        _tile_loadd(5, x[g].low, stride);
        if (format != INT8) {
            _tile_loadd(6, numbers[g % 2], LINE);
            _tile_loadd(7, numbers[g % 2] + GROUP / 4 * LINE, LINE);
        } else {
            _tile_loadd(6, group + 2 * COLUMNS, 2 * LINE);
            _tile_loadd(7, group + 2 * COLUMNS + LINE, 2 * LINE);
        }
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        if (format != INT8 && g + 1 < num_groups) {
            batch_numbers(args, g + 1, format, numbers[(g + 1) % 2]);
        }
        if (g > 0) {
            batch_add(x + g - 1, num_groups, args->rows, group - nbytes, tiles[(g - 1) % 2], sums);
        }
        _tile_stored(0, own, LINE);
        _tile_stored(1, own + BATCH_ROWS * HALF, LINE);
        _tile_stored(2, own + 2 * BATCH_ROWS * HALF, LINE);
        _tile_stored(3, own + 3 * BATCH_ROWS * HALF, LINE);
    }
    TILES_READ_MEMORY;
    batch_add(x + num_groups - 1, num_groups, args->rows, group - nbytes, tiles[(num_groups - 1) % 2], sums);
    for (int64_t m = 0; m < args->rows; m++) {
        for (int half = 0; half < 2; half++) {
            __m512 sum = _mm512_load_ps(sums + m * COLUMNS + half * HALF);
            if (args->bias) {
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(args->bias + half * HALF));
            }
            store_avx512(args, m, half * HALF, (floats_avx512)sum);
        }
    }
}

AMX_BYTES_TARGET static void int8_batch(const tile_args *args) { batch_tile(args, INT8); }
AMX_BYTES_TARGET static void int4_batch(const tile_args *args) { batch_tile(args, INT4); }
AMX_BYTES_TARGET static void halves_batch(const tile_args *args) { batch_tile(args, HALVES); }
static const tile_fn int8_batch_tiles[] = {int8_batch}, int4_batch_tiles[] = {int4_batch},
                     halves_batch_tiles[] = {halves_batch};
static const tile_set int8_batch_set = {.tiles = int8_batch_tiles, .tile_rows = BATCH_ROWS, .take = int8_take,
                                        .take_nbytes = sizeof(few_group), .begin = batch_begin, .end = amx_end};
static const tile_set int4_batch_set = {.tiles = int4_batch_tiles, .tile_rows = BATCH_ROWS, .take = int4_take,
                                        .take_nbytes = sizeof(few_group), .begin = batch_begin, .end = amx_end};
static const tile_set halves_batch_set = {.tiles = halves_batch_tiles, .tile_rows = BATCH_ROWS, .take = int8_take,
                                          .take_nbytes = sizeof(few_group), .begin = batch_begin, .end = amx_end};
