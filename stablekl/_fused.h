/* What the kernels in C share: tiles of elements in float64, logarithms and exponentials as vector instructions.
 *
 * Plain C without Python or torch: `_fused.py` passes addresses through ctypes, which releases the interpreter lock.
 * Every element, the last one of an odd length too, goes through the same vector instructions, and contraction into
 * fused multiply-adds is off, so that an element's bits depend neither on its position nor on the width of the vectors.
 */
#ifndef STABLEKL_FUSED_H
#define STABLEKL_FUSED_H

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

/* One version of a loop per generation of processors, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define CLONES
#endif

/* Elements at a time: fewer where many tiles have to stay in the cache. */
#ifndef TILE
#define TILE 256
#endif
#define EACH for (int j = 0; j < TILE; j++)
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

/* log(x) of positive normal x, to an absolute error of an ulp of max(1, its size). */
INLINE double logarithm(double x)
{
    double k, m = split(x, &k), s = (m - 1.0) / (m + 1.0), w = s * s, p = ATANH_WIDE[0];
    for (int i = 1; i < 12; i++)
        p = p * w + ATANH_WIDE[i];
    return k * LOG2 + (2.0 * s + 2.0 * s * w * p);
}

/* z - log(1 + z), -0.6 < z < 1: see special._log1pmx_near for the order of the operations. */
INLINE double excess_near(double z, const double *atanh, int terms)
{
    double h = 0.5 * z * z, s = z / (z + 2.0), w = s * s, p = atanh[0];
    for (int i = 1; i < terms; i++)
        p = p * w + atanh[i];
    return h - s * (h + 2.0 * w * p);
}

/* v - log(1 + v) from v and from q = 1 + v; where v > -0.6 or q is a normal number, or 0. */
INLINE double remainder_of_log(double v, double q)
{
    int high = v > -0.6;
    double x = high ? 1.0 + v : q, near = excess_near(v, ATANH_WIDE, 12);
    double far = (high ? v : q - 1.0) - logarithm(x);
    far = x > 0.0 ? far : x == 0.0 ? INFINITY : NAN;
    far = x < INFINITY ? far : x;
    return high && v < 1.0 ? near : far;
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
    double far = (q - 1.0) - logarithm(q);
    return q > 0.25 && q < 4.0 ? near : far;
}

/* The same where the quotient is not a positive normal number. */
INLINE double excess_extreme(double a, double b, double q)
{
    return q == INFINITY ? q : (q - 1.0) - (log(a) - log(b));
}

/* r = (a - b)/b as computed; -1 where b is infinite and it is not a number. */
INLINE double unless_infinite(double r, double b)
{
    return r != r && b == INFINITY ? -1.0 : r;
}

/* a * b - p for p = a * b, exactly: Dekker's product, which needs no fused multiply-add. */
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

INLINE void store(void *target, const double *tile, int64_t start, int64_t count, int wide)
{
    if (wide)
        memcpy((double *)target + start, tile, (size_t)count * 8);
    else
        for (int64_t i = 0; i < count; i++)
            ((float *)target)[start + i] = (float)tile[i];
}

#endif
