"""KL divergence by Sobol points, against the exact one-dimensional engine in rotated disguise."""

from __future__ import annotations

import mpmath
import pytest
import torch

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import sobol
from stablekl.mixtures.engines.line import line_kl
from stablekl.mixtures.engines.sobol import sobol_information, sobol_kl
from stablekl.mixtures.engines.spectral import label_information


def random(generator, rows, k, d, separation, full=False):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = torch.log_softmax(normal(rows, k), -1)
    loc, scale = separation * normal(rows, k, d), torch.exp(0.5 * normal(rows, k, d))
    if full:
        shear = torch.eye(d, dtype=torch.float64) + torch.tril(0.3 * normal(rows, k, d, d), -1)
        scale = scale.unsqueeze(-1) * shear
    return Components(weights, loc, scale)


def disguise(line, rotation, scale):
    """One-dimensional mixtures times a Gaussian common to all of them, rotated: KL and I stay the same."""
    rows, k, _ = line.loc.shape
    d = rotation.shape[-1]
    loc = torch.cat((line.loc, torch.zeros(rows, k, d - 1, dtype=torch.float64)), -1)
    sd = torch.cat((line.scale, scale.expand(rows, k, d - 1)), -1)
    covariance = rotation @ torch.diag_embed(sd**2) @ rotation.mT
    return Components(line.log_weights, (rotation @ loc.unsqueeze(-1)).squeeze(-1), torch.linalg.cholesky(covariance))


def problems(count, seed):
    """Exact problems in 1 to 8 dimensions: up to 8 components, from near each other to 10 sigma apart."""
    generator = torch.Generator().manual_seed(seed)

    def integer(n):
        return int(torch.randint(1, n + 1, (), generator=generator))

    def uniform():
        return float(torch.rand((), generator=generator))

    rows = 4
    for i in range(count // rows):
        d, kp, kq, separation = integer(8), integer(8), integer(8), 10 * uniform() ** 2
        p, q = random(generator, rows, kp, 1, separation), random(generator, rows, kq, 1, separation)
        if i % 4 == 0:
            shift = torch.randn(p.loc.shape, generator=generator, dtype=torch.float64)
            q = p._replace(loc=p.loc + 0.1 * uniform() * shift)
        rotation = torch.linalg.qr(torch.randn(rows, 1, d, d, generator=generator, dtype=torch.float64))[0]
        scale = torch.exp(0.5 * torch.randn(rows, 1, d - 1, generator=generator, dtype=torch.float64))
        yield p, q, disguise(p, rotation, scale), disguise(q, rotation, scale)


def exact_information(p):
    total = torch.zeros_like(p.loc[:, 0, 0])
    for k in range(p.loc.shape[-2]):
        zero = torch.zeros_like(p.log_weights[:, :1])
        one = Components(zero, p.loc[:, k : k + 1], p.scale[:, k : k + 1])
        total = total + torch.exp(p.log_weights[:, k]) * line_kl(one, p)[0]
    return total


@pytest.mark.parametrize("count", [48, pytest.param(600, marks=pytest.mark.slow)])
def test_the_interval_covers_the_truth_and_the_default_budget_is_enough(count):
    covered, covered_information, narrow = [], [], []
    for p, q, high_p, high_q in problems(count, seed=1):
        value, error = sobol_kl(high_p, high_q)
        truth = line_kl(p, q)[0]
        covered.append((value - truth).abs() <= error + 1e-13)
        narrow.append((value - truth).abs() <= error / 3 + 1e-13)
        assert (error <= 1e-2 * (1 + truth)).all()
        assert ((value - truth).abs() <= 4 * error + 1e-13).all()
        value, error = sobol_information(high_p)
        covered_information.append((value - exact_information(p)).abs() <= error + 1e-13)
        assert (error <= 1e-2).all()
    for hits in (covered, covered_information):
        # 95 % nominal, less two standard errors of the count
        share = torch.cat(hits).double().mean()
        assert share >= 0.95 - 2 * (0.05 * 0.95 / count) ** 0.5
    # the must-fail twin: an interval a third as wide
    assert torch.cat(narrow).double().mean() < 0.95 - 2 * (0.05 * 0.95 / count) ** 0.5


def test_information_and_divergence_agree():
    # KL(p || q) = S - I for a single Gaussian q, S in closed form
    generator = torch.Generator().manual_seed(2)
    p = random(generator, 3, 5, 3, 2.0)
    q = Components(*(torch.zeros(3, *s, dtype=torch.float64) for s in ((1,), (1, 3), (1, 3))))
    q = q._replace(scale=q.scale + 3.0)
    each = (0.5 * ((p.scale / 3) ** 2 + (p.loc / 3) ** 2 - 1) - torch.log(p.scale / 3)).sum(-1)
    mean = (torch.exp(p.log_weights) * each).sum(-1)
    information, information_error = sobol_information(p)
    value, error = sobol_kl(p, q)
    assert ((value - (mean - information)).abs() <= 2 * (error + information_error)).all()


@pytest.mark.parametrize("full", [False, True])
def test_equal_parameters_give_zero_with_zero_gradient(full):
    p = random(torch.Generator().manual_seed(3), 2, 3, 4, 2.0, full)
    a, b = ([t.clone().requires_grad_() for t in p] for _ in range(2))
    value, error = sobol_kl(Components(*a), Components(*b), num_points=64)
    assert value.tolist() == error.tolist() == [0.0, 0.0]
    for g in torch.autograd.grad(value.sum(), a + b):
        assert torch.equal(g, torch.zeros_like(g))


def test_near_equality_keeps_the_sign_and_the_relative_error_that_log_ratios_lose():
    p = random(torch.Generator().manual_seed(4), 4, 3, 4, 2.0, True)
    q = p._replace(loc=p.loc + 1e-5)
    value, error = sobol_kl(p, q)
    assert (value > 0).all()
    assert (error < 0.05 * value).all()
    # must fail: the mean of log p - log q at the same points of p
    z = sobol.sobol_normals(4, 1024, 8, torch.device("cpu"))
    mean = torch.zeros(8, 4, dtype=torch.float64)
    for k in range(3):
        x = sobol.points(p, k, z)
        u = sobol.mixture_log_prob(x, p) - sobol.mixture_log_prob(x, q)
        mean = mean + torch.exp(p.log_weights[:, k]) * u.mean(1)
    assert (mean.std(0) > 10 * error).all()


def test_expm1_of_the_log_ratio_has_no_variance_where_q_is_wider():
    p = Components(*(torch.tensor(t, dtype=torch.float64) for t in ([0.0], [[0.0, 0.0]], [[1.0, 1.0]])))
    q = p._replace(scale=5 * p.scale)
    value, error = sobol_kl(p, q)
    truth = 2 * (torch.log(torch.tensor(5.0)) + 0.5 * (1 / 25 - 1))
    assert abs(float(value - truth)) <= 2 * float(error)
    assert float(error) < 0.01
    z = sobol.sobol_normals(2, 1024, 8, torch.device("cpu"))
    u = sobol.mixture_log_prob(z, p) - sobol.mixture_log_prob(z, q)
    assert float((u + torch.expm1(-u)).mean(1).std()) > 10 * float(error)


def test_identical_components_carry_no_information():
    row = torch.ones(4, 3, dtype=torch.float64)
    p = Components(torch.full((4,), 0.25, dtype=torch.float64).log(), row, 2 * row)
    value, error = sobol_information(p)
    assert abs(float(value)) < 1e-29
    assert float(error) < 1e-29


def test_a_weight_of_zero_is_as_good_as_no_component():
    p = random(torch.Generator().manual_seed(5), 2, 2, 3, 2.0)
    q = random(torch.Generator().manual_seed(6), 2, 2, 3, 2.0)

    def pad(c):
        return Components(
            torch.cat((c.log_weights, torch.full((2, 1), -torch.inf, dtype=torch.float64)), -1),
            *(torch.cat((t, 7 * torch.ones(2, 1, 3, dtype=torch.float64)), 1) for t in (c.loc, c.scale)),
        )

    a, b = ([t.clone().requires_grad_() for t in pad(c)] for c in (p, q))
    value, _ = sobol_kl(Components(*a), Components(*b), num_points=64)
    assert torch.allclose(value, sobol_kl(p, q, num_points=64)[0], rtol=1e-13, atol=0)
    information, _ = sobol_information(Components(*a), num_points=64)
    # of three components, one of them dead, the control variates know everything
    assert torch.allclose(information, label_information(p), rtol=0, atol=1e-10)
    for g in torch.autograd.grad((value + information).sum(), a + b):
        assert torch.isfinite(g).all()


def test_the_integrand_and_its_slope():
    u = [0.0, 1e-9, -1e-9, 0.3, -0.3, 0.999, 1.001, -0.999, -1.001, 5.0, -5.0, 50.0, -50.0, 800.0, -800.0, 1e6, -1e6]
    x = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    value = sobol._excess(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    with mpmath.workdps(50):
        a = mpmath.mpf(sobol.SHARE)

        def f(t):
            return (mpmath.exp(t) * (t - 1) + 1) / (a * mpmath.exp(t) + 1 - a)

        for t, v, d, s in zip(u, value.tolist(), slope.tolist(), second.tolist(), strict=True):
            t = mpmath.mpf(t)
            assert abs(v - f(t)) <= 1e-15 * f(t)
            if abs(t) < 100 and t:
                assert abs(d - mpmath.diff(f, t)) <= 1e-15 * abs(mpmath.diff(f, t))
            if abs(t) < 10:
                assert abs(s - mpmath.diff(f, t, 2)) <= 1e-13
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()
    assert torch.isfinite(second).all()


def functions(full):
    def lower(scale):  # what is above the diagonal of a factor is not read
        return scale.tril() if full else scale

    def kl(lp, mp, sp, lq, mq, sq):
        sp, sq = lower(sp), lower(sq)
        p = Components(torch.log_softmax(lp, -1), mp, sp)
        return sobol_kl(p, Components(torch.log_softmax(lq, -1), mq, sq), num_points=32)[0]

    def information(lp, mp, sp, lq, mq, sq):
        rest = (lq.sum(-1) + mq.sum((-1, -2)) + sq.flatten(sq.ndim - 2 - full).sum(-1)) * 0
        return sobol_information(Components(torch.log_softmax(lp, -1), mp, lower(sp)), num_points=32)[0] + rest

    return {"kl": kl, "information": information}


@pytest.mark.parametrize("name", ["kl", "information"])
@pytest.mark.parametrize("full", [False, True])
def test_derivatives_are_those_of_the_value(name, full):
    f = functions(full)[name]
    generator = torch.Generator().manual_seed(7)
    x = [*random(generator, 2, 3, 2, 1.5, full), *random(generator, 2, 2, 2, 1.5, full)]
    leaves = [t.clone().requires_grad_() for t in x]
    assert torch.autograd.gradcheck(f, leaves, rtol=1e-6, atol=1e-8, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, rtol=1e-5, atol=1e-6, fast_mode=True)
    value = f(*leaves)
    grads = torch.autograd.grad(value.sum(), leaves)
    assert torch.allclose(torch.vmap(f)(*x), value.detach(), rtol=1e-13, atol=0)
    for row, g in zip(torch.vmap(torch.func.jacrev(f, argnums=tuple(range(6))))(*x), grads, strict=True):
        assert torch.allclose(row, g, rtol=1e-10, atol=1e-12)
    _, tangent = torch.func.jvp(f, tuple(x), tuple(torch.ones_like(t) for t in x))
    assert torch.allclose(tangent.sum(), sum(g.sum() for g in grads), rtol=1e-10, atol=1e-12)


def test_same_bits_every_time_and_blocks_change_nothing_but_rounding(monkeypatch):
    generator = torch.Generator().manual_seed(8)
    p, q = random(generator, 2, 3, 3, 2.0, True), random(generator, 2, 2, 3, 2.0, True)
    first, again = sobol_kl(p, q), sobol_kl(p, q)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    information = sobol_information(p)
    monkeypatch.setattr(sobol, "BLOCK", 2**12)
    assert torch.allclose(sobol_kl(p, q)[0], first[0], rtol=1e-13, atol=0)
    assert torch.allclose(sobol_information(p)[0], information[0], rtol=1e-13, atol=0)


def test_more_points_less_error():
    generator = torch.Generator().manual_seed(9)
    p, q = random(generator, 8, 4, 3, 2.0), random(generator, 8, 3, 3, 2.0)
    errors = [sobol_kl(p, q, num_points=2**n)[1].log().mean() for n in (6, 9, 12)]
    assert errors[1] < errors[0] - 1.0  # plain Monte Carlo: log(sqrt(8)) = 1.04; measured 1.4 to 1.7
    assert errors[2] < errors[1] - 1.0


# torch.compile instantiates autograd functions, against its own advice
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # torch's compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("kl", "inductor"), ("information", "aot_eager")])
def test_traced_whole_by_torch_compile(name, backend):
    """One graph, forward and backward. Inductor did not come to an end with the control variates' in nine minutes."""
    f = functions(False)[name]
    generator = torch.Generator().manual_seed(10)
    leaves = [t.requires_grad_() for c in (3, 2) for t in random(generator, 2, c, 2, 1.5)]
    compiled, eager = torch.compile(f, fullgraph=True, backend=backend)(*leaves), f(*leaves)
    assert torch.allclose(compiled, eager, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
