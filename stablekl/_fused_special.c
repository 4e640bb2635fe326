/* The special functions that KL divergences of scalar families are made of, in one pass over memory each.
 *
 * The formulas are those of special.py and of _bregman.remainder_of_log. Where an argument of the logarithm is not a
 * normal number, which is rare, the C library's takes over, element by element.
 */
#include "_fused.h"

/* Elements start to end of v - log(1 + v). in: v and 1 + v, of stride 0 or 1. wide: float64 rather than float32. */
CLONES PUBLIC void stablekl_remainder_of_log(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double v[TILE], q[TILE], result[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        int extreme = 0;
        load(v, in[0], stride[0], i, count, wide);
        load(q, in[1], stride[1], i, count, wide);
        for (int j = 0; j < TILE; j++) {
            result[j] = remainder_of_log(v[j], q[j]);
            extreme |= q[j] > 0.0 && q[j] < DBL_MIN;
        }
        for (int j = 0; extreme && j < TILE; j++)
            if (v[j] <= -0.6 && q[j] > 0.0 && q[j] < DBL_MIN)
                result[j] = (q[j] - 1.0) - log(q[j]);
        store(out, result, i, count, wide);
    }
}

/* Elements start to end of log(1 + x) - x. in: x. */
CLONES PUBLIC void stablekl_log1pmx(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double x[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load(x, in[0], stride[0], i, count, wide);
        for (int j = 0; j < TILE; j++)
            x[j] = -remainder_of_log(x[j], 1.0 + x[j]);
        store(out, x, i, count, wide);
    }
}

/* Elements start to end of (a - b)/b - log(a/b). in: a and b. */
CLONES PUBLIC void stablekl_log_ratio_bregman(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double a[TILE], b[TILE], result[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        int extreme = 0;
        load(a, in[0], stride[0], i, count, wide);
        load(b, in[1], stride[1], i, count, wide);
        if (wide) {
            for (int j = 0; j < TILE; j++) {
                double q = a[j] / b[j];
                extreme |= !(q >= DBL_MIN && q <= DBL_MAX);
                result[j] = excess_wide(a[j], b[j], q);
            }
            for (int j = 0; extreme && j < TILE; j++) {
                double q = a[j] / b[j];
                if (!(q >= DBL_MIN && q <= DBL_MAX))
                    result[j] = excess_extreme(a[j], b[j], q);
            }
        } else {
            for (int j = 0; j < TILE; j++)
                result[j] = excess_narrow(a[j] / b[j], (a[j] - b[j]) / b[j]);
        }
        store(out, result, i, count, wide);
    }
}

/* Elements start to end of e^x - 1 - x. in: x. */
CLONES PUBLIC void stablekl_expm1mx(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double x[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load(x, in[0], stride[0], i, count, wide);
        if (wide)
            for (int j = 0; j < TILE; j++)
                x[j] = 2.0 * half_excess(x[j], 1);
        else
            for (int j = 0; j < TILE; j++)
                x[j] = 2.0 * half_excess(x[j], 0);
        store(out, x, i, count, wide);
    }
}

/* Elements start to end of a polynomial. in: x, of stride 0 or 1, and stride[1] coefficients, the highest power's first. */
CLONES PUBLIC void stablekl_polynomial(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    const double *coefficients = in[1];
    double x[TILE], p[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load(x, in[0], stride[0], i, count, wide);
        EACH p[j] = coefficients[0];
        for (int64_t k = 1; k < stride[1]; k++)
            EACH p[j] = p[j] * x[j] + coefficients[k];
        store(out, p, i, count, wide);
    }
}
