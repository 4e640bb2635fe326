/* The logarithm, and what Stirling's formulas leave of log Gamma and digamma, in twice the digits of float64.
 *
 * The algorithms are those of _double.py and _double_gamma.py, step by step, a tile of elements at a time, so that every step is a loop of
 * vector instructions; see _fused.h for why contraction is off. A product's
 * error is one fused multiply-add here, where torch's operations need seventeen.
 */
#define TILE 64
#include "_fused.h"

#define STEPS 20

/* 1/k!, k = 1 ... 13, in two parts, and k = 14 ... 26. */
static const double FACTORIAL_HI[13] = {
    1.0, 0.5, 0.16666666666666666, 0.041666666666666664, 0.008333333333333333, 0.001388888888888889,
    0.0001984126984126984, 2.48015873015873e-05, 2.7557319223985893e-06, 2.755731922398589e-07, 2.505210838544172e-08,
    2.08767569878681e-09, 1.6059043836821613e-10,
};
static const double FACTORIAL_LO[13] = {
    0.0, 0.0, 9.25185853854297e-18, 2.3129646346357427e-18, 1.1564823173178714e-19, -5.300543954373577e-20,
    1.7209558293420705e-22, 2.1511947866775882e-23, -1.858393274046472e-22, 2.3767714622250297e-23,
    -1.448814070935912e-24, -1.20734505911326e-25, 1.2585294588752098e-26,
};
static const double SMALL_FACTORIAL[13] = {
    1.1470745597729725e-11, 7.647163731819816e-13, 4.779477332387385e-14, 2.8114572543455206e-15,
    1.5619206968586225e-16, 8.22063524662433e-18, 4.110317623312165e-19, 1.9572941063391263e-20,
    8.896791392450574e-22, 3.868170170630684e-23, 1.6117375710961184e-24, 6.446950284384474e-26,
    2.4795962632247976e-27,
};
/* B_2k/(2k (2k - 1)), k = 1 ... 8, in two parts, and k = 9 ... 19; then B_2k/(2k). */
static const double LGAMMA_HI[8] = {
    0.08333333333333333, -0.002777777777777778, 0.0007936507936507937, -0.0005952380952380953, 0.0008417508417508417,
    -0.0019175269175269176, 0.00641025641025641, -0.029550653594771242,
};
static const double LGAMMA_LO[8] = {
    4.625929269271485e-18, 1.0601087908747154e-19, 6.883823317368282e-22, 5.36938218754726e-20,
    3.6870174889237694e-20, 1.0675702776872475e-19, 2.2240044563805217e-19, 4.861760957508855e-19,
};
static const double LGAMMA_SMALL[11] = {
    0.17964437236883057, -1.3924322169059011, 13.402864044168393, -156.84828462600203, 2193.1033333333335,
    -36108.77125372499, 691472.268851313, -15238221.539407415, 382900751.39141417, -10882266035.784391,
    347320283765.00226,
};
static const double DIGAMMA_HI[8] = {
    0.08333333333333333, -0.008333333333333333, 0.003968253968253968, -0.004166666666666667, 0.007575757575757576,
    -0.021092796092796094, 0.08333333333333333, -0.4432598039215686,
};
static const double DIGAMMA_LO[8] = {
    4.625929269271485e-18, -1.1564823173178714e-19, 2.20282346155785e-19, -5.782411586589357e-20,
    -2.1026951223961299e-19, 1.3911677399530732e-18, 4.625929269271485e-18, -2.0462934179365632e-17,
};
static const double DIGAMMA_SMALL[11] = {
    3.0539543302701198, -26.456212121212122, 281.46014492753625, -3607.5105463980462, 54827.583333333336,
    -974936.8238505747, 20052695.79668808, -472384867.7216299, 12635724795.916666, -380879311252.4537,
    12850850499305.084,
};
/* log 2 in three parts, of which an integer below 2^11 times the first is exact. */
#define LOG2_FIRST 0.6931471805598903
#define LOG2_SECOND 5.497923018708371e-14
#define LOG2_THIRD 1.94704509238075e-31

typedef struct {
    double hi, lo;
} dd;

typedef struct {
    double hi[TILE], lo[TILE];
} tile;

INLINE dd at(const tile *x, int j)
{
    return (dd){x->hi[j], x->lo[j]};
}

INLINE void put(tile *x, int j, dd y)
{
    x->hi[j] = y.hi;
    x->lo[j] = y.lo;
}

INLINE dd normal(double hi, double lo)
{
    double s = hi + lo;
    return (dd){s, lo - (s - hi)};
}

/* A second part, 0 where the first has overflowed or nearly. */
INLINE double kept(double lo)
{
    return lo - lo == 0.0 ? lo : 0.0;
}

INLINE dd kept_normal(double hi, double lo)
{
    dd x = normal(hi, lo);
    return (dd){x.hi, kept(x.lo)};
}

INLINE dd exact_sum(double a, double b)
{
    double s = a + b, c = s - a;
    return (dd){s, (a - (s - c)) + (b - c)};
}

INLINE dd exact_product(double a, double b)
{
    double p = a * b;
    return (dd){p, fma(a, b, -p)};
}

INLINE dd add(dd x, dd y)
{
    dd s = exact_sum(x.hi, y.hi), t = exact_sum(x.lo, y.lo), v = normal(s.hi, s.lo + t.hi);
    return normal(v.hi, t.lo + v.lo);
}

INLINE dd subtract(dd x, dd y)
{
    return add(x, (dd){-y.hi, -y.lo});
}

INLINE dd multiply(dd x, dd y)
{
    dd p = exact_product(x.hi, y.hi);
    return normal(p.hi, p.lo + (x.hi * y.lo + (x.lo * y.hi + x.lo * y.lo)));
}

INLINE dd divide(dd x, dd y)
{
    double q = x.hi / y.hi;
    dd p = exact_product(q, y.hi);
    double rest = ((x.hi - p.hi) - p.lo) + (x.lo - q * y.lo);
    return normal(q, rest / y.hi);
}

INLINE dd number(double x)
{
    return (dd){x, 0.0};
}

INLINE dd choose(int first, dd x, dd y)
{
    return (dd){first ? x.hi : y.hi, first ? x.lo : y.lo};
}

/* Of numbers from 1/sqrt(2) - 1 to sqrt(2) - 1, in place: Newton's step, from a logarithm in float64. */
INLINE void log1p_near(tile *z)
{
    double y[TILE];
    tile e;
    EACH {
        double sum = 0.0;
        y[j] = z->hi[j] - excess_near(z->hi[j], ATANH_WIDE, 12);
        for (int k = 12; k >= 0; k--)
            sum = (sum + SMALL_FACTORIAL[k]) * y[j];
        put(&e, j, number(sum));
    }
    for (int k = 12; k > 0; k--)
        EACH put(&e, j, multiply(add(at(&e, j), (dd){FACTORIAL_HI[k], FACTORIAL_LO[k]}), number(y[j])));
    EACH {
        dd less = multiply(add(at(&e, j), number(1.0)), number(y[j])), rest = subtract(at(z, j), less);
        put(z, j, normal(y[j], (rest.hi + rest.lo) / (1.0 + less.hi)));
    }
}

/* log(x), from x - 1 too. */
INLINE void log_tile(const tile *x, const tile *less_one, tile *out)
{
    const uint64_t fraction = 0x000fffffffffffffu, one = 0x3ff0000000000000u, two52 = 0x4330000000000000u;
    double k[TILE];
    tile z;
    EACH {
        uint64_t bits, exponent, mantissa;
        double m, e, lift = x->hi[j] < DBL_MIN ? 0x1p54 : 1.0, h = x->hi[j] * lift, l = x->lo[j] * lift;
        memcpy(&bits, &h, 8);
        exponent = ((bits >> 52) & 0x7ffu) | two52; /* 2^52 and the exponent, as a float */
        mantissa = (bits & fraction) | one;
        memcpy(&m, &mantissa, 8);
        memcpy(&e, &exponent, 8);
        int high = m > 1.4142135623730951;
        k[j] = (e - 4503599627370496.0) - (high ? 1022.0 : 1023.0) - (lift > 1.0 ? 54.0 : 0.0);
        m = high ? 0.5 * m : m;
        dd rest = add((dd){m, l * (h == 0.0 ? 1.0 : m / h)}, number(-1.0));
        put(&z, j, choose(k[j] == 0.0, at(less_one, j), rest));
    }
    log1p_near(&z);
    EACH {
        dd shift = add(number(k[j] * LOG2_FIRST), add(exact_product(k[j], LOG2_SECOND), number(k[j] * LOG2_THIRD)));
        dd result = add(shift, at(&z, j));
        double h = x->hi[j], end = h == 0.0 ? -INFINITY : h == INFINITY ? INFINITY : NAN;
        int inside = h > 0.0 && h < INFINITY;
        put(out, j, choose(inside, result, number(end)));
    }
}

INLINE void log_of(const tile *x, tile *out)
{
    tile less;
    EACH put(&less, j, subtract(at(x, j), number(1.0)));
    log_tile(x, &less, out);
}

/* The polynomial in w <= 1/400, lowest coefficient first, whose terms from the ninth on are small. */
INLINE void series(const tile *w, const double *hi, const double *lo, const double *small, tile *out)
{
    EACH {
        double sum = 0.0;
        for (int k = 10; k >= 0; k--)
            sum = (sum + small[k]) * w->hi[j];
        put(out, j, number(sum));
    }
    for (int k = 7; k > 0; k--)
        EACH put(out, j, multiply(add(at(out, j), (dd){hi[k], lo[k]}), at(w, j)));
    EACH put(out, j, add(at(out, j), (dd){hi[0], lo[0]}));
}

INLINE void stirling_tile(const tile *x, tile *lgamma, tile *digamma)
{
    tile z, safe, inverse, w, u, product, slope, log_z, log_x, log_product;
    EACH {
        dd v = at(x, j);
        int near = v.hi < STEPS;
        put(&safe, j, choose(near, v, number(1.0)));
        put(&z, j, choose(near, add(v, number(STEPS)), v));
        put(&inverse, j, divide(number(1.0), at(&z, j)));
        put(&w, j, multiply(at(&inverse, j), at(&inverse, j)));
        /* (x + i)(x + 19 - i) = x (x + 19) + i (19 - i) */
        put(&u, j, multiply(at(&safe, j), add(at(&safe, j), number(STEPS - 1))));
        put(&product, j, at(&u, j));
        put(&slope, j, number(1.0));
    }
    series(&w, LGAMMA_HI, LGAMMA_LO, LGAMMA_SMALL, lgamma);
    series(&w, DIGAMMA_HI, DIGAMMA_LO, DIGAMMA_SMALL, digamma);
    for (int i = 1; i < STEPS / 2; i++)
        EACH {
            dd factor = add(at(&u, j), number(i * (STEPS - 1 - i)));
            put(&slope, j, add(multiply(at(&slope, j), factor), at(&product, j)));
            put(&product, j, multiply(at(&product, j), factor));
        }
    EACH {
        int near = x->hi[j] < STEPS;
        dd twice = add(multiply(at(&safe, j), number(2.0)), number(STEPS - 1));
        put(&slope, j, divide(multiply(at(&slope, j), twice), at(&product, j)));
        put(&safe, j, choose(near, at(x, j), at(&z, j)));
        put(&product, j, choose(near, at(&product, j), number(1.0)));
    }
    log_of(&z, &log_z);
    log_of(&safe, &log_x);
    log_of(&product, &log_product);
    EACH {
        int near = x->hi[j] < STEPS;
        dd v = at(&safe, j), one_over = at(&inverse, j), gap = subtract(at(&log_z, j), at(&log_x, j));
        dd far_l = multiply(at(lgamma, j), one_over), far_d = multiply(at(digamma, j), at(&w, j));
        dd less = subtract(multiply(subtract(v, number(0.5)), gap), at(&log_product, j));
        dd steps = multiply(subtract(at(&log_z, j), number(1.0)), number(STEPS));
        dd halves = multiply(subtract(divide(number(1.0), v), one_over), number(0.5));
        dd second = subtract(subtract(at(&slope, j), halves), gap);
        put(lgamma, j, choose(near, add(far_l, add(less, steps)), far_l));
        put(digamma, j, choose(near, add(far_d, second), far_d));
    }
}

/* Elements start to end of log(x). in: x and x - 1, each in two parts, of stride 0 or 1; out: two parts. */
CLONES PUBLIC void stablekl_double_log(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    tile x, less_one, result;
    void *const *results = out;
    for (; start < end; start += TILE) {
        int64_t count = end - start < TILE ? end - start : TILE;
        load(x.hi, in[0], stride[0], start, count, wide);
        load(x.lo, in[1], stride[1], start, count, wide);
        load(less_one.hi, in[2], stride[2], start, count, wide);
        load(less_one.lo, in[3], stride[3], start, count, wide);
        log_tile(&x, &less_one, &result);
        store(results[0], result.hi, start, count, wide);
        store(results[1], result.lo, start, count, wide);
    }
}

/* Elements start to end of both remainders. in: x in two parts, of stride 0 or 1; out: two parts of either. */
CLONES PUBLIC void stablekl_double_stirling(
    const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)
{
    tile x, lgamma, digamma;
    void *const *results = out;
    for (; start < end; start += TILE) {
        int64_t count = end - start < TILE ? end - start : TILE;
        load(x.hi, in[0], stride[0], start, count, wide);
        load(x.lo, in[1], stride[1], start, count, wide);
        stirling_tile(&x, &lgamma, &digamma);
        store(results[0], lgamma.hi, start, count, wide);
        store(results[1], lgamma.lo, start, count, wide);
        store(results[2], digamma.hi, start, count, wide);
        store(results[3], digamma.lo, start, count, wide);
    }
}

#define BINARY(name, evaluated)                                                                                      \
    /* Elements start to end of an operation. in: two numbers of two parts each; out: two parts. */                  \
    CLONES PUBLIC void stablekl_double_##name(                                                                       \
        const void *const *in, const int64_t *stride, int64_t start, int64_t end, int wide, void *out)               \
    {                                                                                                                \
        tile x, y, result;                                                                                           \
        void *const *results = out;                                                                                  \
        for (; start < end; start += TILE) {                                                                         \
            int64_t count = end - start < TILE ? end - start : TILE;                                                 \
            load(x.hi, in[0], stride[0], start, count, wide);                                                        \
            load(x.lo, in[1], stride[1], start, count, wide);                                                        \
            load(y.hi, in[2], stride[2], start, count, wide);                                                        \
            load(y.lo, in[3], stride[3], start, count, wide);                                                        \
            EACH put(&result, j, evaluated(at(&x, j), at(&y, j)));                                                   \
            store(results[0], result.hi, start, count, wide);                                                        \
            store(results[1], result.lo, start, count, wide);                                                        \
        }                                                                                                            \
    }

/* The same operations where parts may overflow: as _double.py has them. */
INLINE dd kept_sum(double a, double b)
{
    dd s = exact_sum(a, b);
    return (dd){s.hi, kept(s.lo)};
}

INLINE dd kept_product(double a, double b)
{
    dd p = exact_product(a, b);
    return (dd){p.hi, kept(p.lo)};
}

INLINE dd kept_add(dd x, dd y)
{
    dd s = kept_sum(x.hi, y.hi), t = kept_sum(x.lo, y.lo), v = kept_normal(s.hi, s.lo + t.hi);
    return kept_normal(v.hi, t.lo + v.lo);
}

INLINE dd kept_multiply(dd x, dd y)
{
    dd p = kept_product(x.hi, y.hi);
    return kept_normal(p.hi, p.lo + (x.hi * y.lo + (x.lo * y.hi + x.lo * y.lo)));
}

INLINE dd kept_divide(dd x, dd y)
{
    double q = x.hi / y.hi;
    dd p = kept_product(q, y.hi);
    double rest = ((x.hi - p.hi) - p.lo) + (x.lo - q * y.lo);
    return kept_normal(q, kept(rest / y.hi));
}

BINARY(add, kept_add)
BINARY(multiply, kept_multiply)
BINARY(divide, kept_divide)
