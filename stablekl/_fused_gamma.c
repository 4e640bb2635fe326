/* What Stirling's formulas leave of lgamma and digamma, the Bregman divergence of lgamma, and the KL divergence of Beta
 * distributions.
 *
 * The formulas are those of distributions/cross/_pieces.py, _bregman.py and distributions/dirichlet.py, term by term, a
 * tile at a time: every step is a loop of vector instructions.
 */
#define TILE 64
#include "_fused.h"

#define STEPS 10
#define TERMS 7

static const double STIRLING[TERMS] = {
    1.0 / 12, -1.0 / 360, 1.0 / 1260, -1.0 / 1680, 1.0 / 1188, -691.0 / 360360, 1.0 / 156,
};
/* Gauss and Legendre's four nodes and weights on [0, 1]. */
static const double NODES[4] = {0.06943184420297371, 0.33000947820757187, 0.6699905217924281, 0.9305681557970262};
static const double WEIGHTS[4] = {0.17392742256872692, 0.32607257743127307, 0.32607257743127307, 0.17392742256872692};
/* B_2k/(2k (2k - 1)) and B_2k/(2k), k = 8 ... 1. */
static const double LGAMMA[8] = {
    -3617.0 / 122400, 1.0 / 156, -691.0 / 360360, 1.0 / 1188, -1.0 / 1680, 1.0 / 1260, -1.0 / 360, 1.0 / 12,
};
static const double DIGAMMA[8] = {
    -3617.0 / 8160, 1.0 / 12, -691.0 / 32760, 1.0 / 132, -1.0 / 240, 1.0 / 252, -1.0 / 120, 1.0 / 12,
};

INLINE double rounding(double a, double b, double p)
{
    return fma(a, b, -p);
}

INLINE double finite_or_zero(double x)
{
    return x - x == 0.0 ? x : 0.0;
}

INLINE double product_difference(double a, double b, double c, double e)
{
    double p = a * b, q = c * e, difference = p - q;
    return difference + finite_or_zero(sum_error(p, -q, difference) + (rounding(a, b, p) - rounding(c, e, q)));
}

/* R(x) and S(x): for x below 10 the steps that lead to Stirling's series. */
INLINE void remainders_tile(const double *x, double *r, double *s)
{
    EACH {
        double z = x[j] < STEPS ? x[j] + STEPS : x[j], w = 1.0 / z / z, p = LGAMMA[0], q = DIGAMMA[0];
        for (int i = 1; i < 8; i++) {
            p = p * w + LGAMMA[i];
            q = q * w + DIGAMMA[i];
        }
        r[j] = p / z;
        s[j] = q * w;
    }
    for (int n = STEPS - 1; n >= 0; n--)
        EACH {
            double v = (x[j] < STEPS ? x[j] : 1.0) + n, t = 1.0 / (2.0 * v + 1.0), square = t * t, p = ATANH_WIDE[0];
            for (int i = 1; i < 12; i++)
                p = p * square + ATANH_WIDE[i];
            double lift = v < 1e-290 ? 0x1p64 : 1.0, log_v = logarithm(v * lift) - (lift > 1.0 ? 64.0 * LOG2 : 0.0);
            double log = v < 1e-100 ? -log_v : logarithm(1.0 + 1.0 / v);
            double far = (0.5 * log / t - 1.0) / square, rest = t < 3.0 / 7 ? p : far;
            double step_s = 2.0 * t * square * (1.0 / (4.0 * v * (v + 1.0) * square) - rest);
            r[j] += x[j] < STEPS ? square * rest : 0.0;
            s[j] += x[j] < STEPS ? step_s : 0.0;
        }
}

/* Sum of c_k h_(2k-2)(u, u, w), h the complete homogeneous symmetric polynomial. */
INLINE void stirling_series(const double *u, const double *w, double *total)
{
    double one[TILE], two[TILE], three[TILE];
    EACH {
        one[j] = two[j] = three[j] = 1.0;
        total[j] = STIRLING[0];
    }
    for (int k = 1; k < TERMS; k++)
        EACH {
            for (int i = 0; i < 2; i++) {
                one[j] *= u[j];
                two[j] = one[j] + u[j] * two[j];
                three[j] = two[j] + w[j] * three[j];
            }
            total[j] += STIRLING[k] * three[j];
        }
}

/* (d/x)^2/y times that sum at 1/x, 1/x, 1/y. */
INLINE void series_at(const double *x, const double *y, const double *d, double *out)
{
    double u[TILE], w[TILE];
    EACH {
        u[j] = 1.0 / x[j];
        w[j] = 1.0 / y[j];
    }
    stirling_series(u, w, out);
    EACH out[j] *= (d[j] / x[j]) * (d[j] / y[j]) * u[j];
}

/* B_g(y, x) with d = y - x, g(a) = lgamma(a) - a log(a) + a. */
INLINE void bregman_tile(const double *y, const double *x, const double *d, double *out)
{
    double far_x[TILE], far_y[TILE];
    EACH {
        far_x[j] = x[j] + STEPS;
        far_y[j] = y[j] + STEPS;
    }
    series_at(far_x, far_y, d, out);
    EACH out[j] += 0.5 * remainder_of_log(d[j] / far_x[j], far_y[j] / far_x[j]);
    for (int n = STEPS - 1; n > 0; n--)
        EACH {
            double v = d[j] / (x[j] + n) / (y[j] + n + 1.0);
            out[j] += (y[j] + n + 1.0) * remainder_of_log(v, 1.0 + v);
        }
    /* The first step: L changes by up to 2.6 times as many ulps as v, so what rounding took from v is added. */
    EACH {
        double a = x[j], b = y[j], f = b + 1.0, v = d[j] / f / a, g = v * f, h = a * g;
        double lost = (d[j] - h) - rounding(a, g, h) - a * rounding(v, f, g);
        lost += (d[j] == b - a ? sum_error(b, -a, d[j]) : 0.0) - a * (v * sum_error(b, 1.0, f));
        double rest = finite_or_zero(lost / a / f * (v / (1.0 + v)));
        /* a multiple of a tiny y: only the logarithm is left of the ratio, and subnormal numbers round */
        int tiny = b < 1e-290;
        double z = tiny ? b * 0x1p64 : b;
        double q = a > 1.0 ? (z / f) * ((a + 1.0) / a) : (z / a) * ((a + 1.0) / f);
        double remainder = remainder_of_log(v, q) + (tiny && v <= -0.6 ? 64.0 * LOG2 : 0.0);
        out[j] += f * (remainder + (v > -0.6 ? rest : 0.0));
    }
}

/* Sum of (2k - 1) c_k h_(2k-1)(u, w). */
INLINE void odd_series(const double *u, const double *w, double *total)
{
    double one[TILE], two[TILE];
    EACH {
        one[j] = u[j];
        two[j] = u[j] + w[j];
        total[j] = STIRLING[0] * two[j];
    }
    for (int k = 1; k < TERMS; k++)
        EACH {
            for (int i = 0; i < 2; i++) {
                one[j] *= u[j];
                two[j] = one[j] + w[j] * two[j];
            }
            total[j] += (2 * k + 1) * STIRLING[k] * two[j];
        }
}

/* g'(x) - g'(y) with d = x - y, but for the steps before the first. */
INLINE void change_tile(const double *x, const double *y, const double *d, int first, double *out)
{
    double u[TILE], v[TILE], one[TILE], two[TILE];
    EACH {
        int falls = d[j] > 0.0;
        u[j] = falls ? x[j] : y[j];
        v[j] = falls ? y[j] : x[j];
        one[j] = 1.0 / (u[j] + STEPS);
        two[j] = 1.0 / (v[j] + STEPS);
    }
    odd_series(one, two, out);
    EACH out[j] = (fabs(d[j]) * one[j]) * two[j] * (0.5 + out[j]);
    for (int n = STEPS - 1; n >= first; n--)
        EACH {
            double a = u[j] + n, w = fabs(d[j]) / (a + 1.0) / (v[j] + n);
            out[j] += w / a + remainder_of_log(w, 1.0 + w);
        }
    EACH out[j] = d[j] > 0.0 ? out[j] : -out[j];
}

/* x^2 g''(x). */
INLINE void bend_tile(const double *x, double *out)
{
    double one[TILE];
    EACH one[j] = 1.0 / (x[j] + STEPS);
    odd_series(one, one, out);
    EACH {
        double share = x[j] / (x[j] + STEPS);
        out[j] = share * share * (0.5 + out[j]);
    }
    for (int n = STEPS - 1; n >= 0; n--)
        EACH {
            double u = x[j] + n, part = x[j] / u;
            out[j] += part * part / (u + 1.0);
        }
}

/* The fall of trigamma from x + 1 to x + 1 + d, d >= 0. */
INLINE void fall_tile(const double *x, const double *d, double *out)
{
    double u[TILE], w[TILE], power[TILE], total[TILE];
    EACH {
        u[j] = 1.0 / (x[j] + STEPS);
        w[j] = 1.0 / (x[j] + d[j] + STEPS);
        out[j] = 1.0 + 0.5 * (u[j] + w[j]);
        power[j] = total[j] = 1.0;
    }
    for (int k = 1; k <= TERMS; k++)
        EACH {
            for (int i = 0; i < 2; i++) {
                power[j] *= u[j];
                total[j] = power[j] + w[j] * total[j];
            }
            out[j] += (2 * k - 1) * 2 * k * STIRLING[k - 1] * total[j];
        }
    EACH out[j] *= (d[j] * w[j]) * u[j];
    for (int n = STEPS - 1; n > 0; n--)
        EACH {
            double a = x[j] + n, b = a + d[j];
            out[j] += d[j] / b * (1.0 / a + 1.0 / b) / a;
        }
}

/* What Stirling's series adds for a less what it adds for a + b: where b is small an integral over what is between. */
INLINE void series(const double *a_p, const double *a_q, const double *d_a, const double *b_p, const double *b_q,
                   const double *d_b, const double *cross, double *out)
{
    double x[TILE], y[TILE], d[TILE], u[TILE], w[TILE], even[TILE], odd[TILE], sum[TILE];
    double one[TILE], two[TILE], three[TILE];
    EACH {
        x[j] = a_p[j] + b_p[j];
        y[j] = a_q[j] + b_q[j];
        d[j] = d_a[j] + d_b[j];
        sum[j] = 0.0;
    }
    series_at(x, y, d, even);
    series_at(a_p, a_q, d_a, out);
    EACH out[j] -= even[j];
    for (int i = 0; i < 4; i++) {
        EACH {
            u[j] = 1.0 / (a_p[j] + NODES[i] * b_p[j]);
            w[j] = 1.0 / (a_q[j] + NODES[i] * b_q[j]);
            d[j] = d_a[j] + NODES[i] * d_b[j];
            one[j] = two[j] = three[j] = 1.0;
            even[j] = odd[j] = 0.0;
        }
        /* sums of (2k - 1) c_k h_(2k-2) and of (2k - 1) c_k h_(2k-1) of u, u, w */
        for (int k = 0; k < TERMS; k++)
            EACH {
                double c = (2 * k + 1) * STIRLING[k];
                even[j] += c * three[j];
                for (int half = 0; half < 2; half++) {
                    one[j] *= u[j];
                    two[j] = one[j] + u[j] * two[j];
                    three[j] = two[j] + w[j] * three[j];
                    odd[j] += half == 0 ? c * three[j] : 0.0;
                }
            }
        EACH sum[j] += WEIGHTS[i] * (d[j] * w[j]) * u[j] * (cross[j] * u[j] * odd[j] + d_b[j] * u[j] * even[j]);
    }
    EACH {
        double first = b_p[j] / a_p[j], second = b_q[j] / a_q[j];
        out[j] = (first > second ? first : second) < 0.02 ? sum[j] : out[j];
    }
}

/* The discrete divergence of q's means from p's, times q's sum. */
INLINE double means(double x, double y, double b_p, double b_q, double cross)
{
    double s = x + b_p, growth = (y + b_q) / s;
    double first = y * remainder_of_log(-cross / y / s, (x / y) * growth);
    return first + b_q * remainder_of_log(cross / b_q / s, (b_p / b_q) * growth);
}

/* v: a_p, a_q, b_p, b_q, the differences q - p of both, and these less the same multiple of p's; the tiles of the larger
 * and the smaller concentration of p are exchanged where need be. */
INLINE void beta_tile(double v[8][TILE], double *out)
{
    double base[TILE], cross[TILE], d[TILE], sum[TILE], sizes[TILE], far_p[TILE], far_q[TILE], rest[TILE];
    double gap_a[TILE], gap_b[TILE], gap_s[TILE];
    double *a_p = v[0], *a_q = v[1], *b_p = v[2], *b_q = v[3], *d_a = v[4], *d_b = v[5], *e_a = v[6], *e_b = v[7];
    EACH {
        int swap = a_p[j] < b_p[j];
        double p = a_p[j], q = a_q[j], x = d_a[j], y = e_a[j];
        a_p[j] = swap ? b_p[j] : p, b_p[j] = swap ? p : b_p[j];
        a_q[j] = swap ? b_q[j] : q, b_q[j] = swap ? q : b_q[j];
        d_a[j] = swap ? d_b[j] : x, d_b[j] = swap ? x : d_b[j];
        e_a[j] = swap ? e_b[j] : y, e_b[j] = swap ? y : e_b[j];
    }
    EACH {
        double a = a_p[j], b = b_p[j], size = b * a_q[j] + a * b_q[j];
        double by_d = fabs(b * d_a[j]) + fabs(a * d_b[j]), by_e = fabs(b * e_a[j]) + fabs(a * e_b[j]);
        double plain = product_difference(b, a_q[j], a, b_q[j]);
        plain = by_d < size ? product_difference(b, d_a[j], a, d_b[j]) : plain;
        size = by_d < size ? by_d : size;
        base[j] = by_e < size ? product_difference(b, e_a[j], a, e_b[j]) : plain;
        d[j] = d_a[j] + d_b[j];
        sum[j] = sizes[j] = 0.0;
    }
    for (int n = 0; n <= STEPS; n++)
        EACH {
            double x = a_p[j] + n, y = a_q[j] + n, s = x + b_p[j], z = y + b_q[j], weight = n < STEPS ? 1.0 : 0.5;
            double c = base[j] - n * d_b[j], tau = c / x / z;
            double first = weight * (d[j] / s * tau), second = weight * remainder_of_log(tau, (y / x) * (s / z));
            sum[j] += first + second;
            sizes[j] += fabs(first) + fabs(second);
            cross[j] = c;
        }
    EACH {
        far_p[j] = a_p[j] + STEPS;
        far_q[j] = a_q[j] + STEPS;
    }
    series(far_p, far_q, d_a, b_p, b_q, d_b, cross, rest);
    EACH rest[j] += means(far_p[j], far_q[j], b_p[j], b_q[j], cross[j]);
    bregman_tile(a_q, a_p, d_a, gap_a);
    bregman_tile(b_q, b_p, d_b, gap_b);
    EACH {
        far_p[j] = a_p[j] + b_p[j];
        far_q[j] = a_q[j] + b_q[j];
    }
    bregman_tile(far_q, far_p, d, gap_s);
    EACH {
        double gaps = gap_a[j] + gap_b[j], near = means(a_p[j], a_q[j], b_p[j], b_q[j], base[j]);
        int alike = gaps + near + gap_s[j] < sizes[j] + fabs(rest[j]) + gap_b[j];
        out[j] = alike ? gaps + near - gap_s[j] : sum[j] + rest[j] + gap_b[j];
    }
}

/* Elements start to end of R(x) and S(x). in: x, of stride 0 or 1, float64 as everywhere in this file; out: both. */
CLONES PUBLIC void stablekl_remainders(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double x[TILE], r[TILE], s[TILE];
    void *const *result = out;
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load(x, in[0], stride[0], i, count, wide);
        remainders_tile(x, r, s);
        store(result[0], r, i, count, wide);
        store(result[1], s, i, count, wide);
    }
}

#define OF_THREE(name, evaluated)                                                                                    \
    /* Elements start to end of a function of three. */                                                              \
    CLONES PUBLIC void stablekl_##name(                                                                              \
        const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)               \
    {                                                                                                                \
        double x[TILE], y[TILE], d[TILE], result[TILE];                                                              \
        for (int64_t i = start; i < end; i += TILE) {                                                                \
            int64_t count = end - i < TILE ? end - i : TILE;                                                         \
            load(x, in[0], stride[0], i, count, wide);                                                               \
            load(y, in[1], stride[1], i, count, wide);                                                               \
            load(d, in[2], stride[2], i, count, wide);                                                               \
            evaluated;                                                                                               \
            store(out, result, i, count, wide);                                                                      \
        }                                                                                                            \
    }

/* B_g(x, y) with d = x - y, and g'(x) - g'(y), also without the first step. */
OF_THREE(lgamma_bregman, bregman_tile(x, y, d, result))
OF_THREE(lgamma_change, change_tile(x, y, d, 0, result))
OF_THREE(lgamma_change_next, change_tile(x, y, d, 1, result))

/* Elements start to end of x^2 g''(x). in: x. */
CLONES PUBLIC void stablekl_lgamma_bend(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double x[TILE], result[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load(x, in[0], stride[0], i, count, wide);
        bend_tile(x, result);
        store(out, result, i, count, wide);
    }
}

/* Elements start to end of the fall of trigamma. in: x and d. */
CLONES PUBLIC void stablekl_trigamma_fall(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double x[TILE], d[TILE], result[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        load(x, in[0], stride[0], i, count, wide);
        load(d, in[1], stride[1], i, count, wide);
        fall_tile(x, d, result);
        store(out, result, i, count, wide);
    }
}

/* Elements start to end of KL(Beta(a_p, b_p) || Beta(a_q, b_q)). in: the eight of beta_tile. */
CLONES PUBLIC void stablekl_beta_kl(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    double v[8][TILE], result[TILE];
    for (int64_t i = start; i < end; i += TILE) {
        int64_t count = end - i < TILE ? end - i : TILE;
        for (int k = 0; k < 8; k++)
            load(v[k], in[k], stride[k], i, count, wide);
        beta_tile(v, result);
        store(out, result, i, count, wide);
    }
}
