/* Tiles of processors that multiply bfloat16 themselves: AVX512_BF16 by pairs, AMX by whole tiles. Both read x as it is.
 *
 * Both flush subnormal numbers to zero, as the processor's instructions do.
 */
#define DOT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))

DOT_TARGET INLINE void store_dot(const tile_args *args, int64_t row, __m512 low, __m512 high) {
    if (args->bias) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(args->bias));
        high = _mm512_add_ps(high, _mm512_loadu_ps(args->bias + HALF));
    }
    const __mmask32 mask = args->columns >= COLUMNS ? 0xffffffffu : (1u << args->columns) - 1;
    if (args->y_dtype == FLOAT32) {
        float *y = (float *)args->y + row * args->y_stride;
        _mm512_mask_storeu_ps(y, (__mmask16)mask, low);
        _mm512_mask_storeu_ps(y + HALF, (__mmask16)(mask >> HALF), high);
        return;
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi16((uint16_t *)args->y + row * args->y_stride, mask, both);
}

/* `rows` is a constant wherever this is inlined. Few rows have two chains of sums each, to wait for none. */
DOT_TARGET INLINE void dot_tile(const tile_args *args, const int rows) {
    const int chains = rows <= 6 ? 2 : 1;
    __m512 low[2][12], high[2][12];
#pragma GCC unroll 2
    for (int c = 0; c < 2; c++) {
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            low[c][m] = high[c][m] = _mm512_setzero_ps();
        }
    }
    const char *panel = args->panel;
    const int64_t num_pairs = args->num_in / 2;
    for (int64_t k = 0; k < num_pairs; k += chains) {
#pragma GCC unroll 2
        for (int c = 0; c < chains; c++, panel += COLUMNS * 4) {
            if (c > 0 && k + c >= num_pairs) {
                break;
            }
            __builtin_prefetch(panel + AHEAD, 0, 3);
            __builtin_prefetch(panel + AHEAD + 64, 0, 3);
            const __m512bh first = (__m512bh)_mm512_loadu_si512(panel);
            const __m512bh second = (__m512bh)_mm512_loadu_si512(panel + HALF * 4);
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                int32_t pair;
                memcpy(&pair, (const uint16_t *)args->x + m * args->x_stride + 2 * (k + c), 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                low[c][m] = _mm512_dpbf16_ps(low[c][m], x, first);
                high[c][m] = _mm512_dpbf16_ps(high[c][m], x, second);
            }
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
        store_dot(args, m, _mm512_add_ps(low[0][m], low[1][m]), _mm512_add_ps(high[0][m], high[1][m]));
    }
}

#define TILE(rows) \
    DOT_TARGET static void dot_##rows(const tile_args *args) { dot_tile(args, rows); }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#undef TILE
static const tile_fn dot_tiles[] = {dot_1, dot_2, dot_3, dot_4,  dot_5,  dot_6,
                                    dot_7, dot_8, dot_9, dot_10, dot_11, dot_12};
static const tile_set dot_set = {.tiles = dot_tiles, .tile_rows = 12};

#ifdef HAVE_TILES
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))

enum { AMX_ROWS = 32, AMX_AHEAD = 512 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_nbytes[16];
    uint8_t rows[16];
} amx_config;

/* Tiles 0 to 3 are sums of 16 rows and 16 columns, 4 and 5 rows of x, 6 and 7 the panel's two halves. */
AMX_TARGET static void amx_begin(int64_t rows) {
    const uint8_t upper = (uint8_t)(rows < 16 ? rows : 16), lower = (uint8_t)(rows - upper);
    const uint8_t all[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    amx_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.rows[i] = all[i];
        config.row_nbytes[i] = all[i] ? 64 : 0;
    }
    /* The compiler's own intrinsic does not say that it reads the whole structure. */
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

AMX_TARGET static void amx_end(void) { __asm__ volatile("tilerelease"); }

AMX_TARGET static void amx_tile(const tile_args *args) {
    float sums[AMX_ROWS * COLUMNS] __attribute__((aligned(64)));
    const int64_t rows = args->rows;
    const uint16_t *x = args->x;
    const char *panel = args->panel;
    /* The first tile streams the panel from memory; the others find it in the cache and share the next one. */
    const int64_t lines = args->ahead_step * (TILE_STEPS / 2) / 64;
    const char *fetched = args->first ? panel + AMX_AHEAD : args->ahead;
    TILES_READ_MEMORY;
    _tile_zero(0);
    _tile_zero(1);
    if (rows > 16) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < args->num_in; k += TILE_STEPS, panel += TILE_STEPS * COLUMNS * 2) {
        for (int64_t line = 0; line < lines / 2; line++) {
            __builtin_prefetch(fetched + 64 * line, 0, 3);
        }
        _tile_loadd(4, x + k, args->x_stride * 2);
        _tile_loadd(6, panel, COLUMNS * 4);
        _tile_dpbf16ps(0, 4, 6);
        for (int64_t line = lines / 2; line < lines; line++) {
            __builtin_prefetch(fetched + 64 * line, 0, 3);
        }
        fetched += 64 * lines;
        _tile_loadd(7, panel + HALF * 4, COLUMNS * 4);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > 16) {
            _tile_loadd(5, x + 16 * args->x_stride + k, args->x_stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, COLUMNS * 4);
    _tile_stored(1, sums + HALF, COLUMNS * 4);
    if (rows > 16) {
        _tile_stored(2, sums + 16 * COLUMNS, COLUMNS * 4);
        _tile_stored(3, sums + 16 * COLUMNS + HALF, COLUMNS * 4);
    }
    for (int64_t m = 0; m < rows; m++) {
        store_dot(args, m, _mm512_load_ps(sums + m * COLUMNS), _mm512_load_ps(sums + m * COLUMNS + HALF));
    }
}

static const tile_fn amx_tiles[] = {amx_tile};
static const tile_set amx_set = {.tiles = amx_tiles, .tile_rows = AMX_ROWS, .begin = amx_begin, .end = amx_end};

/* Whether the processor has matrix tiles and the system lets this process use them. It saves their registers only for
 * processes that ask, for good; signal handlers then need larger stacks of their own. */
static int amx_granted(void) {
    uint32_t a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    enum { OF_BFLOAT16 = 1 << 22, ANY = 1 << 24, OF_BYTES = 1 << 25 };
    if ((~d & (OF_BFLOAT16 | ANY | OF_BYTES)) != 0) {
        return 0;
    }
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#endif
