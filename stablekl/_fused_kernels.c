/* The KL divergence of Normal distributions, by their standard deviations or log-variances, and its gradient in one pass
 * over memory each. The formulas are those of distributions/normal.py and losses/gaussian.py.
 */
#include "_fused.h"

/* Of the functions' arguments: that of _fused.py. */
PUBLIC const int stablekl_fused_version = 9;

/* (t^2 + r (r + 2))/sigma_q, t and r as below: the derivative by sigma_q, up to its sign. Where r < 0 the two terms may
 * cancel and leave nothing of t and r as rounded; then it is (d^2 + sigma_p^2 - sigma_q^2)/sigma_q^3 with d = mu_p - mu_q,
 * as x^2 + (y - sigma_q)(y + sigma_q) to twice the digits, y the larger of sigma_p and |d|. */
INLINE double slope(double mu_p, double sigma_p, double mu_q, double sigma_q, double t, double r)
{
    double square = t * t, rest = r * (r + 2.0), plain = (rest + square) / sigma_q;
    /* exact: products of what is scaled neither overflow nor underflow where the terms cancel */
    double unit = sigma_q < 0x1p-300 ? 0x1p600 : sigma_q > 0x1p300 ? 0x1p-600 : 1.0;
    double a = unit * sigma_p, b = unit * sigma_q, x = unit * mu_p, y = -(unit * mu_q);
    double d = x + y, rest_of_d = sum_error(x, y, d);
    int swap = a < 0.5 * b;
    double v = swap ? a : d, v_rest = swap ? 0.0 : rest_of_d, w = swap ? d : a, w_rest = swap ? rest_of_d : 0.0;
    double low = w - b, high = w + b, p = v * v, q = low * high, u = p + q;
    double low_rest = sum_error(w, -b, low) + w_rest, high_rest = sum_error(w, b, high) + w_rest;
    double p_error = product_error(v, v, p) + 2.0 * v * v_rest;
    double q_error = product_error(low, high, q) + low * high_rest + high * low_rest + low_rest * high_rest;
    double careful = (u + (sum_error(p, q, u) + (p_error + q_error))) / b / b / b * unit;
    return r < 0.0 && square > -0.25 * rest && square < -4.0 * rest ? careful : plain;
}

/* (x - y)/s, by halves of x and y where their difference overflows. */
INLINE double standardised(double x, double y, double s)
{
    double by = fabs(x - y) <= DBL_MAX ? 1.0 : 0.5;
    return (by * x - by * y) / s * (by == 1.0 ? 1.0 : 2.0);
}

INLINE void load_parameters(double *mu_p, double *sigma_p, double *mu_q, double *sigma_q, const void *const *in,
                            const int64_t *stride, int64_t start, int64_t count, int wide)
{
    load(mu_p, in[0], stride[0], start, count, wide);
    load(sigma_p, in[1], stride[1], start, count, wide);
    load(mu_q, in[2], stride[2], start, count, wide);
    load(sigma_q, in[3], stride[3], start, count, wide);
}

/* Elements start to end of KL(N(mu_p, sigma_p^2) || N(mu_q, sigma_q^2)). in: mu_p, sigma_p, mu_q, sigma_q, of stride 0
 * or 1. wide: float64 rather than float32 throughout. */
CLONES PUBLIC void stablekl_normal_kl(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double mu_p[TILE], sigma_p[TILE], mu_q[TILE], sigma_q[TILE], kl[TILE], quotient[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load_parameters(mu_p, sigma_p, mu_q, sigma_q, in, stride, i, count, wide);
        if (wide) {
            int extreme = 0;
            for (int j = 0; j < TILE; j++) {
                double q = sigma_p[j] / sigma_q[j], t = standardised(mu_p[j], mu_q[j], sigma_q[j]);
                double r = unless_infinite((sigma_p[j] - sigma_q[j]) / sigma_q[j], sigma_q[j]);
                quotient[j] = q;
                extreme |= !(q >= DBL_MIN && q <= DBL_MAX);
                /* (r/2) r: the square may overflow where half of it does not */
                kl[j] = (excess_wide(sigma_p[j], sigma_q[j], q) + 0.5 * r * r) + 0.5 * t * t;
            }
            for (int j = 0; extreme && j < TILE; j++) {
                double q = quotient[j];
                if (!(q >= DBL_MIN && q <= DBL_MAX)) {
                    double r = unless_infinite((sigma_p[j] - sigma_q[j]) / sigma_q[j], sigma_q[j]);
                    double t = standardised(mu_p[j], mu_q[j], sigma_q[j]);
                    kl[j] = (excess_extreme(sigma_p[j], sigma_q[j], q) + 0.5 * r * r) + 0.5 * t * t;
                }
            }
        } else {
            for (int j = 0; j < TILE; j++) {
                double inverse = 1.0 / sigma_q[j], q = sigma_p[j] * inverse, t = (mu_p[j] - mu_q[j]) * inverse;
                double r = unless_infinite((sigma_p[j] - sigma_q[j]) * inverse, sigma_q[j]);
                kl[j] = (excess_narrow(q, r) + 0.5 * r * r) + 0.5 * t * t;
            }
        }
        store(out, kl, i, count, wide);
    }
}

/* Its gradient times that of the caller, in[4]; 0 where the latter is 0, infinite though the former may be. out: for
 * mu_p, sigma_p, mu_q, sigma_q, or NULL where none is wanted. */
CLONES PUBLIC void stablekl_normal_kl_gradient(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *const *out)
{
    double mu_p[TILE], sigma_p[TILE], mu_q[TILE], sigma_q[TILE], grad[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load_parameters(mu_p, sigma_p, mu_q, sigma_q, in, stride, i, count, wide);
        load(grad, in[4], stride[4], i, count, wide);
        if (wide) { /* two loops, or each vector would go through both branches */
            for (int j = 0; j < TILE; j++) {
                double sp = sigma_p[j], sq = sigma_q[j], t = standardised(mu_p[j], mu_q[j], sq);
                double r = unless_infinite((sp - sq) / sq, sq);
                double by_sigma_q = -slope(mu_p[j], sp, mu_q[j], sq, t, r);
                mu_p[j] = t / sq;
                sigma_p[j] = r / sq + r / sp;
                sigma_q[j] = by_sigma_q;
            }
        } else {
            for (int j = 0; j < TILE; j++) {
                double sp = sigma_p[j], sq = sigma_q[j], inverse = 1.0 / sq, t = (mu_p[j] - mu_q[j]) * inverse;
                double r = unless_infinite((sp - sq) * inverse, sq);
                double by_sigma_q = -slope(mu_p[j], sp, mu_q[j], sq, t, r);
                mu_p[j] = t * inverse;
                sigma_p[j] = r * (inverse + 1.0 / sp);
                sigma_q[j] = by_sigma_q;
            }
        }
        for (int j = 0; j < TILE; j++) {
            double g = grad[j];
            mu_p[j] = g == 0.0 ? 0.0 : g * mu_p[j];
            mu_q[j] = -mu_p[j];
            sigma_p[j] = g == 0.0 ? 0.0 : g * sigma_p[j];
            sigma_q[j] = g == 0.0 ? 0.0 : g * sigma_q[j];
        }
        if (out[0])
            store(out[0], mu_p, i, count, wide);
        if (out[1])
            store(out[1], sigma_p, i, count, wide);
        if (out[2])
            store(out[2], mu_q, i, count, wide);
        if (out[3])
            store(out[3], sigma_q, i, count, wide);
    }
}

/* 1/sigma_q of a tile, from log-variances; of a number, of stride 0, it is the same for every tile. */
INLINE void inverses(double *inverse, const double *logvar_q, int wide)
{
    for (int j = 0; j < TILE; j++)
        inverse[j] = exponential(-0.5 * logvar_q[j], wide);
}

/* The same divergence by log-variances. in: mu_p, logvar_p, mu_q, logvar_q. */
CLONES PUBLIC void stablekl_gaussian_kl(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double mu_p[TILE], logvar_p[TILE], mu_q[TILE], logvar_q[TILE], inverse[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load_parameters(mu_p, logvar_p, mu_q, logvar_q, in, stride, i, count, wide);
        if (i == start || stride[3])
            inverses(inverse, logvar_q, wide);
        if (wide)
            for (int j = 0; j < TILE; j++) {
                double m = (mu_p[j] - mu_q[j]) * inverse[j];
                mu_p[j] = half_excess(logvar_p[j] - logvar_q[j], 1) + 0.5 * m * m;
            }
        else
            for (int j = 0; j < TILE; j++) {
                double m = (mu_p[j] - mu_q[j]) * inverse[j];
                mu_p[j] = half_excess(logvar_p[j] - logvar_q[j], 0) + 0.5 * m * m;
            }
        store(out, mu_p, i, count, wide);
    }
}

/* Its gradient times that of the caller, in[4]; 0 where the latter is 0. out: for the four, or NULL. */
CLONES PUBLIC void stablekl_gaussian_kl_gradient(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *const *out)
{
    double mu_p[TILE], logvar_p[TILE], mu_q[TILE], logvar_q[TILE], grad[TILE], inverse[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load_parameters(mu_p, logvar_p, mu_q, logvar_q, in, stride, i, count, wide);
        load(grad, in[4], stride[4], i, count, wide);
        if (i == start || stride[3])
            inverses(inverse, logvar_q, wide);
        if (wide)
            for (int j = 0; j < TILE; j++)
                logvar_p[j] = half_expm1(logvar_p[j] - logvar_q[j], 1);
        else
            for (int j = 0; j < TILE; j++)
                logvar_p[j] = half_expm1(logvar_p[j] - logvar_q[j], 0);
        for (int j = 0; j < TILE; j++) {
            double g = grad[j], m = (mu_p[j] - mu_q[j]) * inverse[j];
            logvar_q[j] = g == 0.0 ? 0.0 : -g * (logvar_p[j] + 0.5 * m * m);
            logvar_p[j] = g == 0.0 ? 0.0 : g * logvar_p[j];
            mu_p[j] = g == 0.0 ? 0.0 : g * (m * inverse[j]);
            mu_q[j] = -mu_p[j];
        }
        if (out[0])
            store(out[0], mu_p, i, count, wide);
        if (out[1])
            store(out[1], logvar_p, i, count, wide);
        if (out[2])
            store(out[2], mu_q, i, count, wide);
        if (out[3])
            store(out[3], logvar_q, i, count, wide);
    }
}

/* The name that a build of Python extensions exports on Windows; nothing calls it. */
PUBLIC void *PyInit__fused_kernels(void)
{
    return 0;
}
