/* The gate of a gated linear unit: N. Shazeer, "GLU Variants Improve Transformer" (2020).
 *
 * SiLU and the tanh form of GELU are both x * sigmoid(x * (a + b x^2)): with a = 1, b = 0, and with
 * a = 2 sqrt(2 / pi), b = 0.044715 a, since (1 + tanh(t)) / 2 = sigmoid(2 t).
 */
#include "kernels.h"

typedef struct {
    const void *gate_up;
    void *y;
    int64_t width;
    float linear, cubic;
    int32_t dtype;
} gate_args;

#define ROWS "gate_rows.h"
#include "rowwise_sets.h"

/* y[rows, width] = f(g) * u of gate_up[rows, 2 width] = (g, u), f(x) = x sigmoid(x (linear + cubic x^2)). */
void vattention_gate(const void *gate_up, void *y, int64_t num_rows, int64_t width, float linear, float cubic,
                     int32_t dtype, int32_t num_threads, parallel_fn parallel) {
    const gate_args args = {gate_up, y, width, linear, cubic, dtype};
    for_rows(best_rows(), &args, num_rows, width, num_threads, parallel);
}
