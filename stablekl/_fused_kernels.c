/* The KL divergence of Normal distributions, by their standard deviations or log-variances, and its gradient in one pass
 * over memory each.
 *
 * Plain C without Python or torch: `_fused.py` passes addresses through ctypes, which releases the interpreter lock.
 * The formulas are those of distributions/normal.py and losses/gaussian.py, tile by tile in float64: every element, the last one of an odd
 * length too, goes through the same vector instructions, and contraction into fused multiply-adds is off, so that an
 * element's bits depend neither on its position nor on the width of the vectors.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define PUBLIC __declspec(dllexport)
#define INLINE static __forceinline
#else
#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#endif

/* Of the functions' arguments: that of _fused.py. */
PUBLIC const int stablekl_fused_version = 3;

/* One version of a loop per generation of processors, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#define TILE 256
#define LOG2 0.69314718055994530942

/* (atanh(s) - s)/s^3 in s^2, |s| <= 3/7, highest power first: the tables of special.py. */
static const double ATANH_NARROW[6] = {
    0.12836656903, 0.079165537412, 0.11228274835, 0.14280546023, 0.20000082331, 0.33333333123,
};
static const double ATANH_WIDE[12] = {
    0.11974262895067175, -0.0027016372512737754, 0.06160893542716858, 0.05003989026028942,
    0.05913487309275028, 0.06664198430842003,    0.07692435595045058, 0.09090904910246529,
    0.11111111191430766, 0.14285714284919523,    0.2000000000000307,  0.3333333333333333,
};

/* (expm1(x) - x)/x^2 on [-1.6, 1.3], highest power first: a table of special.py. */
static const double EXP_WIDE[16] = {
    2.521787304106386e-15,  4.871034539917216e-14,  7.668281912639482e-13,  1.1468690828927503e-11,
    1.6058468153483998e-10, 2.087677893072447e-09,  2.505211629487346e-08,  2.7557319115262285e-07,
    2.755731916576075e-06,  2.480158730175495e-05,  0.0001984126984149074,  0.0013888888888889182,
    0.008333333333332962,   0.04166666666666666,    0.16666666666666669,    0.5,
};

/* x = 2^k m with sqrt(1/2) <= m < sqrt(2), for a positive normal x. */
INLINE double split(double x, double *k)
{
    const uint64_t root_half = 0x3fe6a09e667f3bcdu, one = 0x3ff0000000000000u, two52 = 0x4330000000000000u;
    uint64_t bits, exponent;
    double m;
    memcpy(&bits, &x, 8);
    bits += one - root_half;
    exponent = (bits >> 52) | two52;
    bits = (bits & 0x000fffffffffffffu) + root_half;
    memcpy(&m, &bits, 8);
    memcpy(k, &exponent, 8);
    *k -= 4503599627370496.0 + 1023.0;
    return m;
}

/* z - log(1 + z), -0.6 < z < 1: see special._log1pmx_near for the order of the operations. */
INLINE double excess_near(double z, const double *atanh, int terms)
{
    double h = 0.5 * z * z, s = z / (z + 2.0), w = s * s, p = atanh[0];
    for (int i = 1; i < terms; i++)
        p = p * w + atanh[i];
    return h - s * (h + 2.0 * w * p);
}

/* (a - b)/b - log(a/b) for float32 values: q = a/b, r = (a - b)/b. With q = 2^k (1 + z), r - z - k log 2 loses at most
 * three bits of float64 (k = 1 or -1), and is exactly 0 for k = 0, where z = r. */
INLINE double excess_narrow(double q, double r)
{
    double k, m = split(q, &k), z = k == 0.0 ? r : m - 1.0;
    double value = (r - z - k * LOG2) + excess_near(z, ATANH_NARROW, 6);
    value = q < INFINITY ? value : q; /* infinity or NaN */
    return q > 0.0 ? value : q == 0.0 ? INFINITY : NAN;
}

/* The same for float64 values; see special.log_ratio_bregman_value. Right where q is a normal number. */
INLINE double excess_wide(double a, double b, double q)
{
    int low = q < 0.5, high = q > 2.0;
    double scaled_a = low ? a + a : a, scaled_b = high ? b + b : b, z = (scaled_a - scaled_b) / scaled_b;
    double shift = low ? LOG2 - 0.5 - 0.5 * z : high ? 1.0 - LOG2 + z : 0.0;
    double near = shift + excess_near(z, ATANH_WIDE, 12);
    double k, m = split(q, &k), s = (m - 1.0) / (m + 1.0), w = s * s, p = ATANH_WIDE[0];
    for (int i = 1; i < 12; i++)
        p = p * w + ATANH_WIDE[i];
    double far = (q - 1.0) - (k * LOG2 + (2.0 * s + 2.0 * s * w * p));
    return q > 0.25 && q < 4.0 ? near : far;
}

/* The same where the quotient is not a positive normal number. */
static double excess_extreme(double a, double b, double q)
{
    return q == INFINITY ? q : (q - 1.0) - (log(a) - log(b));
}

/* r = (a - b)/b as computed; -1 where b is infinite and it is not a number. */
INLINE double unless_infinite(double r, double b)
{
    return r != r && b == INFINITY ? -1.0 : r;
}

/* a * b - p for p = a * b, exactly: Dekker's product, which needs no fused multiply-add. */
/* (x - y)/s, by halves of x and y where their difference overflows. */
INLINE double standardised(double x, double y, double s)
{
    double by = fabs(x - y) <= DBL_MAX ? 1.0 : 0.5;
    return (by * x - by * y) / s * (by == 1.0 ? 1.0 : 2.0);
}

INLINE double product_error(double a, double b, double p)
{
    double c = 134217729.0 * a, a_high = c - (c - a), a_low = a - a_high;
    double d = 134217729.0 * b, b_high = d - (d - b), b_low = b - b_high;
    return ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low;
}

/* a + b - s for s = a + b, exactly: Knuth's sum. */
INLINE double sum_error(double a, double b, double s)
{
    double c = s - a;
    return (a - (s - c)) + (b - c);
}

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

/* (expm1(x) - x)/x^2 for -1.6 < x < 1.3, or to 2e-10 for |x| < 0.35, by Taylor's series. */
INLINE double excess_ratio(double x)
{
    double p = EXP_WIDE[0];
    for (int i = 1; i < 16; i++)
        p = p * x + EXP_WIDE[i];
    return p;
}

INLINE double excess_ratio_narrow(double x)
{
    double p = 1.0 / 362880.0;
    p = p * x + 1.0 / 40320.0;
    p = p * x + 1.0 / 5040.0;
    p = p * x + 1.0 / 720.0;
    p = p * x + 1.0 / 120.0;
    p = p * x + 1.0 / 24.0;
    p = p * x + 1.0 / 6.0;
    return p * x + 0.5;
}

/* e^x = 2 half (1 + r + excess), half a power of two, |r| < 0.35, excess = e^r - 1 - r; x clamped to [-708, 709.78]. */
INLINE double split_exp(double x, double *half, double *r, int wide)
{
    const double magic = 6755399441055744.0; /* 1.5 2^52: its sum with k has k in the last bits */
    double y = x < -708.0 ? -708.0 : x > 709.78 ? 709.78 : x, t = y * 1.4426950408889634 + magic, k = t - magic;
    uint64_t bits;
    *r = (y - k * 0x1.62e42fefa3800p-1) - k * 0x1.ef35793c76730p-45;
    memcpy(&bits, &t, 8);
    bits = (bits + 1022) << 52;
    memcpy(half, &bits, 8);
    return *r * *r * (wide ? excess_ratio(*r) : excess_ratio_narrow(*r));
}

INLINE double exponential(double x, int wide)
{
    double half, r, excess = split_exp(x, &half, &r, wide), value = (half + half * (r + excess)) * 2.0;
    return x > 709.78 ? INFINITY : x < -708.0 ? 0.0 : value;
}

/* (e^x - 1)/2 */
INLINE double half_expm1(double x, int wide)
{
    double half, r, excess = split_exp(x, &half, &r, wide);
    return x > 709.78 ? INFINITY : (half - 0.5) + half * (r + excess);
}

/* (e^x - 1 - x)/2; the last line is excess/2 where half is 1/2, for then r is x. It loses four bits of float64 at
 * |x| = 0.35, which float32 does not see. */
INLINE double half_excess(double x, int wide)
{
    double half, r, excess = split_exp(x, &half, &r, wide);
    double far = wide ? (half - 0.5 - 0.5 * x) + half * (r + excess) : (half - 0.5) + (half * r - 0.5 * x) + half * excess;
    double near = wide ? 0.5 * x * x * excess_ratio(x) : far;
    return x > 709.78 ? INFINITY : x > -1.6 && x < 1.3 ? near : far;
}

INLINE void load(double *tile, const void *source, int64_t stride, int64_t start, int64_t count, int wide)
{
    if (stride == 0) {
        double x = wide ? *(const double *)source : (double)*(const float *)source;
        for (int i = 0; i < TILE; i++)
            tile[i] = x;
        return;
    }
    if (count < TILE)
        for (int i = 0; i < TILE; i++)
            tile[i] = 1.0;
    if (wide)
        memcpy(tile, (const double *)source + start, (size_t)count * 8);
    else
        for (int64_t i = 0; i < count; i++)
            tile[i] = ((const float *)source)[start + i];
}

INLINE void load_parameters(double *mu_p, double *sigma_p, double *mu_q, double *sigma_q, const void *const *in,
                            const int64_t *stride, int64_t start, int64_t count, int wide)
{
    load(mu_p, in[0], stride[0], start, count, wide);
    load(sigma_p, in[1], stride[1], start, count, wide);
    load(mu_q, in[2], stride[2], start, count, wide);
    load(sigma_q, in[3], stride[3], start, count, wide);
}

INLINE void store(void *target, const double *tile, int64_t start, int64_t count, int wide)
{
    if (wide)
        memcpy((double *)target + start, tile, (size_t)count * 8);
    else
        for (int64_t i = 0; i < count; i++)
            ((float *)target)[start + i] = (float)tile[i];
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
