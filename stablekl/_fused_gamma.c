/* The Bregman divergence of lgamma and the KL divergence of Beta distributions, element by element.
 *
 * The formulas are those of _bregman.py and distributions/dirichlet.py, term by term; float64 throughout. See
 * _fused_kernels.c for how the functions are called.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>

#if defined(_WIN32)
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

#define STEPS 10
#define TERMS 7
#define LOW (-0.6)

static const double STIRLING[TERMS] = {
    1.0 / 12, -1.0 / 360, 1.0 / 1260, -1.0 / 1680, 1.0 / 1188, -691.0 / 360360, 1.0 / 156,
};
/* (atanh(s) - s)/s^3 in s^2, |s| <= 3/7, highest power first: the table of special.py. */
static const double ATANH[12] = {
    0.11974262895067175, -0.0027016372512737754, 0.06160893542716858, 0.05003989026028942,
    0.05913487309275028, 0.06664198430842003,    0.07692435595045058, 0.09090904910246529,
    0.11111111191430766, 0.14285714284919523,    0.2000000000000307,  0.3333333333333333,
};
/* Gauss and Legendre's four nodes and weights on [0, 1]. */
static const double NODES[4] = {0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970262};
static const double WEIGHTS[4] = {0.17392742256872692, 0.32607257743127307, 0.32607257743127307, 0.17392742256872692};

static double product_error(double a, double b, double p)
{
    return fma(a, b, -p);
}

static double sum_error(double a, double b, double s)
{
    double c = s - a;
    return (a - (s - c)) + (b - c);
}

static double product_difference(double a, double b, double c, double e)
{
    double p = a * b, q = c * e, difference = p - q;
    double rest = sum_error(p, -q, difference) + (product_error(a, b, p) - product_error(c, e, q));
    return difference + (isfinite(rest) ? rest : 0.0);
}

/* v - log(1 + v) from v and from q = 1 + v. */
static double remainder_of_log(double v, double q)
{
    if (v > LOW && v < 1.0) {
        double h = 0.5 * v * v, s = v / (v + 2.0), w = s * s, p = ATANH[0];
        for (int i = 1; i < 12; i++)
            p = p * w + ATANH[i];
        return h - s * (h + 2.0 * w * p);
    }
    if (v > LOW) /* by v itself: q may have over- or underflowed on the way */
        return isinf(v) ? v : v - log1p(v);
    return (q - 1.0) - log(q);
}

/* Sum of c_k h_(2k-2)(u, v, w). */
static double stirling_series(double u, double v, double w)
{
    double one = 1.0, two = 1.0, three = 1.0, total = STIRLING[0];
    for (int degree = 1; degree < 2 * TERMS - 1; degree++) {
        one = one * u;
        two = one + v * two;
        three = two + w * three;
        if (degree % 2 == 0)
            total += STIRLING[degree / 2] * three;
    }
    return total;
}

/* Sums of (2k - 1) c_k h_(2k-2) and of (2k - 1) c_k h_(2k-1) of u, v, w. */
static void power_series(double u, double v, double w, double *even, double *odd)
{
    double one = 1.0, two = 1.0, three = 1.0;
    *even = *odd = 0.0;
    for (int degree = 0; degree < 2 * TERMS; degree++) {
        if (degree) {
            one = one * u;
            two = one + v * two;
            three = two + w * three;
        }
        double term = (degree / 2 * 2 + 1) * STIRLING[degree / 2] * three;
        if (degree % 2)
            *odd += term;
        else
            *even += term;
    }
}

/* B_g(y, x) with d = y - x, g(a) = lgamma(a) - a log(a) + a. */
static double lgamma_bregman(double y, double x, double d)
{
    double far_x = x + STEPS, far_y = y + STEPS, u = 1.0 / far_x, w = 1.0 / far_y;
    double v = d / far_x, sum = 0.0;
    double total = v * (d * w) * u * stirling_series(u, u, w) + 0.5 * remainder_of_log(v, far_y / far_x);
    for (int n = 1; n < STEPS; n++) {
        v = d / (x + n) / (y + n + 1.0);
        sum += (y + n + 1.0) * remainder_of_log(v, 1.0 + v);
    }
    /* The first step: L changes by up to 2.6 times as many ulps as v, so what rounding took from v is added. */
    v = d / (y + 1.0) / x;
    double f = y + 1.0, g = v * f, h = x * g;
    double lost = (d - h) - product_error(x, g, h) - x * product_error(v, f, g);
    lost += (d == y - x ? sum_error(y, -x, d) : 0.0) - x * (v * sum_error(y, 1.0, f));
    double rest = lost / x / f * (v / (1.0 + v));
    if (!(isfinite(rest) && v > LOW))
        rest = 0.0;
    /* A multiple of a tiny y: only the logarithm is left of the ratio, and subnormal numbers round. */
    double z = y < 1e-290 ? y * 0x1p64 : y;
    double ratio = x > 1.0 ? (z / f) * ((x + 1.0) / x) : (z / x) * ((x + 1.0) / f);
    double remainder = remainder_of_log(v, ratio);
    if (y < 1e-290 && v <= LOW)
        remainder += 64.0 * 0.6931471805599453;
    return total + sum + f * (remainder + rest);
}

/* What Stirling's series adds from x to y. */
static double series_at(double x, double y, double d)
{
    double u = 1.0 / x, w = 1.0 / y;
    return (d / x) * (d / y) * u * stirling_series(u, u, w);
}

/* What it adds for a less what it adds for a + b. */
static double series(double a_p, double a_q, double d_a, double b_p, double b_q, double d_b, double cross)
{
    if (!(fmax(b_p / a_p, b_q / a_q) < 0.02))
        return series_at(a_p, a_q, d_a) - series_at(a_p + b_p, a_q + b_q, d_a + d_b);
    double total = 0.0;
    for (int i = 0; i < 4; i++) {
        double u = 1.0 / (a_p + NODES[i] * b_p), w = 1.0 / (a_q + NODES[i] * b_q), d = d_a + NODES[i] * d_b, even, odd;
        power_series(u, u, w, &even, &odd);
        total += WEIGHTS[i] * (d * w) * u * (cross * u * odd + d_b * u * even);
    }
    return total;
}

/* The discrete divergence of q's means from p's, times q's sum. */
static double means(double x, double y, double b_p, double b_q, double cross)
{
    double s = x + b_p, growth = (y + b_q) / s;
    double first = y * remainder_of_log(-cross / y / s, (x / y) * growth);
    return first + b_q * remainder_of_log(cross / b_q / s, (b_p / b_q) * growth);
}

static double beta_kl(
    double a_p, double a_q, double b_p, double b_q, double d_a, double d_b, double e_a, double e_b)
{
    if (a_p < b_p) {
        double t = a_p;
        a_p = b_p, b_p = t;
        t = a_q, a_q = b_q, b_q = t;
        t = d_a, d_a = d_b, d_b = t;
        t = e_a, e_a = e_b, e_b = t;
    }
    double base = product_difference(b_p, a_q, a_p, b_q), size = b_p * a_q + a_p * b_q;
    double by_d = fabs(b_p * d_a) + fabs(a_p * d_b), by_e = fabs(b_p * e_a) + fabs(a_p * e_b);
    if (by_d < size) {
        base = product_difference(b_p, d_a, a_p, d_b);
        size = by_d;
    }
    if (by_e < size)
        base = product_difference(b_p, e_a, a_p, e_b);

    double d = d_a + d_b, sum = 0.0, sizes = 0.0, cross = base;
    for (int n = 0; n <= STEPS; n++) {
        double x = a_p + n, y = a_q + n, s = x + b_p, z = y + b_q, weight = n < STEPS ? 1.0 : 0.5;
        cross = base - n * d_b;
        double tau = cross / x / z;
        double first = weight * (d / s * tau), second = weight * remainder_of_log(tau, (y / x) * (s / z));
        sum += first + second;
        sizes += fabs(first) + fabs(second);
    }
    double far_p = a_p + STEPS, far_q = a_q + STEPS;
    double rest = means(far_p, far_q, b_p, b_q, cross) + series(far_p, far_q, d_a, b_p, b_q, d_b, cross);
    double gap_a = lgamma_bregman(a_q, a_p, d_a), gap_b = lgamma_bregman(b_q, b_p, d_b);
    double gap_s = lgamma_bregman(a_q + b_q, a_p + b_p, d);
    double gaps = gap_a + gap_b, near = means(a_p, a_q, b_p, b_q, base);
    if (gaps + near + gap_s < sizes + fabs(rest) + gap_b)
        return gaps + near - gap_s;
    return sum + rest + gap_b;
}

/* Elements start to end of B_g(y, x). in: y, x, y - x, of stride 0 or 1. */
PUBLIC void stablekl_lgamma_bregman(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    const double *y = in[0], *x = in[1], *d = in[2];
    double *result = out;
    (void)wide;
    for (int64_t i = start; i < end; i++)
        result[i] = lgamma_bregman(y[i * stride[0]], x[i * stride[1]], d[i * stride[2]]);
}

/* Elements start to end of KL(Beta(a_p, b_p) || Beta(a_q, b_q)). in: a_p, a_q, b_p, b_q, the differences q - p of both,
 * and these less the same multiple of p's, of stride 0 or 1. */
PUBLIC void stablekl_beta_kl(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double *result = out;
    (void)wide;
    for (int64_t i = start; i < end; i++) {
        double v[8];
        for (int k = 0; k < 8; k++)
            v[k] = ((const double *)in[k])[i * stride[k]];
        result[i] = beta_kl(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
    }
}
