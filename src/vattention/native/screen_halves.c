/* The likeliest tokens of an output layer in 8 bits for half the memory traffic, and for sure.
 *
 * As screen.c has it, but there is no copy: where the layer lies in halves (quantized.c), its upper ones are one already.
 * In a group, a number is c, 16 times its upper half plus 7.5, up to an error e of at most 7.5. x is taken in 8 bits, with
 * a rest r. With the group's scale s, a product's error is at most the sum over groups of s (e x + c r), and Cauchy and
 * Schwarz bound that by s (|e| |x| + |c| |r|), which is tighter than what they say of whole columns. Where a few numbers
 * of x are much larger than others, 7.5 times their sizes is less than their share of |e| |x|. Two numbers are kept of
 * each column: the largest |e| and the largest |c| of its groups.
 */
#include "screen.h"

#ifdef HAVE_SCREEN
#include "halves.h"

/* Bytes between what is multiplied and what is fetched, into the second-level cache: little is computed for each. */
enum { FAR_AHEAD = 8 * AHEAD };

/* What the upper halves are off by on average, and at most from there on, in lower ones, and what is added to numbers. */
static const float MIDDLE = 7.5f, MOST = 7.5f, RAISED = 128.0f;
/* About the |e| of a column. */
static const float TYPICAL = 28.0f;
/* Lets no product of numbers that are too small for the processor get lost. */
static const float TINY = 1e-20f;

/* What a product may be off by beside, relative to a group's |w| |x|: weights rounded to bfloat16 and x in 15 bits where
 * it is computed, and sums in float32 there and here. */
static float rounded(int64_t num_in) { return 0x1p-9f + 0x1p-11f + 0x1p-13f + (float)num_in * 0x1p-23f; }

/* Takes numbers much larger than the others out of their length, as long as the bound gets smaller by it; some twentieth of
 * all are worth it. */
static void set_apart(const uint16_t *x, int64_t count, double squares, screen_group *group) {
    float sizes[GROUP];
    double outliers = 0.0;
    for (int64_t k = 0; k < count; k++) {
        sizes[k] = fabsf(widened(x[k]));
    }
    for (;;) {
        int64_t largest = 0;
        for (int64_t k = 1; k < count; k++) {
            largest = sizes[k] > sizes[largest] ? k : largest;
        }
        double others = 0.0;
        for (int64_t k = 0; k < count; k++) {
            others += k == largest ? 0.0 : (double)sizes[k] * sizes[k];
        }
        if (!(MOST * sizes[largest] < TYPICAL * (sqrt(squares) - sqrt(others)))) {
            break;
        }
        outliers += sizes[largest];
        sizes[largest] = 0.0f;
        squares = others;
    }
    group->norm = (float)sqrt(squares) * 1.00001f;
    group->outliers = (float)outliers * 1.00001f;
}

/* In 8 bits. */
static int split(const uint16_t *x, int64_t count, int8_t *rows, int64_t width, screen_group *group) {
    (void)width;
    float most;
    double squares, lost = 0.0;
    if (!measure(x, count, &most, &squares)) {
        return 0;
    }
    const float factor = most > 0.0f ? 127.0f / most : 0.0f, unit = most / 127.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < count; k++) {
        const float value = widened(x[k]);
        const int32_t number = (int32_t)lrintf(value * factor);
        const double rest = (double)value - (double)unit * number;
        /* In lines of quantized.c, the second and the third of four numbers change places. */
        rows[k % 4 == 1 || k % 4 == 2 ? k ^ 3 : k] = (int8_t)number;
        sum += number;
        lost += rest * rest;
    }
    *group = (screen_group){.unit = unit, .rest = (float)sqrt(lost) * 1.00001f, .sum = (float)sum};
    set_apart(x, count, squares, group);
    return 1;
}

/* `count` is a constant wherever this is inlined. */
SCREEN_TARGET INLINE void vectors(const screening *s, int64_t first, const int count, int64_t panel, float *lower) {
    const int64_t width = s->screen->num_steps * STEP;
    const int8_t *group = (const int8_t *)s->weight->packed + panel * s->num_groups * UPPER_NBYTES;
    const int8_t *x = s->rows + first * width;
    const screen_group *groups = s->groups + first * s->num_groups;
    const __m512i four = _mm512_set1_epi8(15);
    __m512 value[VECTOR_TOKENS][2], error[VECTOR_TOKENS][2];
    __m512 lost[VECTOR_TOKENS][2], outliers[VECTOR_TOKENS][2];
#pragma GCC unroll 4
    for (int m = 0; m < count; m++) {
        value[m][0] = value[m][1] = error[m][0] = error[m][1] = _mm512_setzero_ps();
        lost[m][0] = lost[m][1] = outliers[m][0] = outliers[m][1] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g < s->num_groups; g++, group += UPPER_NBYTES, x += GROUP) {
#pragma GCC unroll 9
        for (int line = 0; line < UPPER_NBYTES / LINE; line++) {
            _mm_prefetch((const char *)group + FAR_AHEAD + LINE * line, _MM_HINT_T1);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const int8_t *line = group + 2 * COLUMNS + half * LINE;
            __m512i sums[VECTOR_TOKENS], sixteens[VECTOR_TOKENS];
#pragma GCC unroll 4
            for (int m = 0; m < count; m++) {
                sums[m] = sixteens[m] = _mm512_setzero_si512();
            }
#pragma GCC unroll 4
            for (int k = 0; k < GROUP; k += 2 * STEP, line += 2 * LINE) {
                const __m512i both = _mm512_loadu_si512(line);
                const __m512i one = _mm512_and_si512(both, four), other = _mm512_andnot_si512(four, both);
#pragma GCC unroll 4
                for (int m = 0; m < count; m++) {
                    int32_t numbers[2];
                    __builtin_memcpy(numbers, x + m * width + k, sizeof(numbers));
                    sums[m] = _mm512_dpbusd_epi32(sums[m], one, _mm512_set1_epi32(numbers[0]));
                    sixteens[m] = _mm512_dpbusd_epi32(sixteens[m], other, _mm512_set1_epi32(numbers[1]));
                }
            }
            const __m256i bits = _mm256_loadu_si256((const __m256i *)(group + half * HALF * 2));
            const __m512 scales = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#pragma GCC unroll 4
            for (int m = 0; m < count; m++) {
                const screen_group *own = &groups[m * s->num_groups + g];
                const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(sums[m], 4), sixteens[m]);
                const __m512 whole = _mm512_add_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps((MIDDLE - RAISED) * own->sum));
                value[m][half] = _mm512_fmadd_ps(whole, _mm512_mul_ps(scales, _mm512_set1_ps(own->unit)), value[m][half]);
                error[m][half] = _mm512_fmadd_ps(scales, _mm512_set1_ps(own->norm), error[m][half]);
                lost[m][half] = _mm512_fmadd_ps(scales, _mm512_set1_ps(own->rest), lost[m][half]);
                outliers[m][half] = _mm512_fmadd_ps(scales, _mm512_set1_ps(own->outliers), outliers[m][half]);
            }
        }
    }
    /* Their sizes also bound what smaller numbers of their group lose where x is taken in 15 bits. */
    const __m512 farthest = _mm512_set1_ps(1.01f * (MOST + 127.0f * rounded(s->weight->num_in)));
    const float *errors = s->screen->errors + panel * COLUMNS, *lengths = errors + s->num_panels * COLUMNS;
#pragma GCC unroll 4
    for (int m = 0; m < count; m++) {
        for (int half = 0; half < 2; half++) {
            const __m512 most = _mm512_loadu_ps(errors + half * HALF), length = _mm512_loadu_ps(lengths + half * HALF);
            error[m][half] = _mm512_fmadd_ps(error[m][half], most, _mm512_set1_ps(TINY));
            error[m][half] = _mm512_fmadd_ps(lost[m][half], length, error[m][half]);
            error[m][half] = _mm512_fmadd_ps(outliers[m][half], farthest, error[m][half]);
        }
        bound(s, first + m, panel, value[m], error[m], lower);
    }
}

SCREEN_TARGET static void by_vectors(const screening *s, int64_t first, int64_t count, int64_t panel, float *lower) {
    switch (count) {
    case 1:
        vectors(s, first, 1, panel, lower);
        break;
    case 2:
        vectors(s, first, 2, panel, lower);
        break;
    case 3:
        vectors(s, first, 3, panel, lower);
        break;
    default:
        vectors(s, first, VECTOR_TOKENS, panel, lower);
    }
}

SCREEN_TARGET static void pack(void *job) {
    screen_pack_job *j = job;
    const int64_t num_in = j->weight->num_in, num_groups = (num_in + GROUP - 1) / GROUP;
    const int64_t num_panels = (j->screen->num_out + COLUMNS - 1) / COLUMNS;
    const float slack = rounded(num_in);
    for (;;) {
        const int64_t panel = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
        if (panel >= num_panels) {
            return;
        }
        const uint8_t *group = (const uint8_t *)j->weight->packed + panel * num_groups * UPPER_NBYTES;
        const uint8_t *lower = (const uint8_t *)vattention_lower_halves(j->weight, panel);
        int32_t most[COLUMNS] = {0}, largest[COLUMNS] = {0}, longest[COLUMNS] = {0};
        for (int64_t g = 0; g < num_groups; g++, group += UPPER_NBYTES) {
            int32_t squares[COLUMNS] = {0}, whole[COLUMNS] = {0}, centres[COLUMNS] = {0}, scaled[COLUMNS];
            for (int i = 0; i < COLUMNS; i++) {
                uint16_t bits;
                __builtin_memcpy(&bits, group + 2 * i, 2);
                if (!(widened(bits) < LARGEST)) {
                    __atomic_store_n(&j->bad, 1, __ATOMIC_RELAXED);
                    return;
                }
                scaled[i] = widened(bits) > 0.0f;
            }
            for (int line = 0; line < HALVES_NBYTES; line += LINE, lower += LINE) {
                const uint8_t *upper = group + 2 * COLUMNS + line;
                for (int i = 0; i < HALF; i++) {
                    int32_t square = 0, own = 0, centre = 0;
                    for (int k = 4 * i; k < 4 * i + 4; k++) {
                        const int32_t one = 2 * (lower[k] & 15) - 15, other = 2 * (lower[k] >> 4) - 15;
                        const int32_t first = (upper[k] & 15) * 16 + (lower[k] & 15) - 128;
                        const int32_t second = (upper[k] & 240) + (lower[k] >> 4) - 128;
                        square += one * one + other * other;
                        own += first * first + second * second;
                        /* Twice c. */
                        centre += (2 * first - one) * (2 * first - one) + (2 * second - other) * (2 * second - other);
                    }
                    squares[line / LINE % 2 * HALF + i] += square;
                    whole[line / LINE % 2 * HALF + i] += own;
                    centres[line / LINE % 2 * HALF + i] += centre;
                }
            }
            for (int i = 0; i < COLUMNS; i++) {
                most[i] = scaled[i] && squares[i] > most[i] ? squares[i] : most[i];
                largest[i] = scaled[i] && whole[i] > largest[i] ? whole[i] : largest[i];
                longest[i] = scaled[i] && centres[i] > longest[i] ? centres[i] : longest[i];
            }
        }
        for (int i = 0; i < COLUMNS; i++) {
            j->screen->errors[panel * COLUMNS + i] =
                1.01f * (0.5f * sqrtf((float)most[i]) + slack * sqrtf((float)largest[i])) + 0.01f;
            j->screen->errors[(num_panels + panel) * COLUMNS + i] = 1.01f * 0.5f * sqrtf((float)longest[i]) + 0.01f;
        }
    }
}

const screen_kind vattention_halves = {
    .by_vectors = by_vectors, .split = split, .pack = pack, .group = GROUP, .num_bytes = 1};
#endif
