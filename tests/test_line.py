"""KL divergence in one dimension: truth by mpmath from the definition, on the exact values of the inputs."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import mpmath as mp
import pytest
import torch

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import line
from stablekl.mixtures.engines.line import line_kl

# name: components (weight, mean, standard deviation) of p and of q
CASES = {
    "two gaussians": ([(1.0, 0.0, 1.0)], [(1.0, 1.0, 2.0)]),
    "moment matched": ([(0.5, -5.0, 1.0), (0.5, 10.0, 1.0)], [(1.0, 2.5, 7.566)]),
    "reverse": ([(1.0, 2.5, 7.566)], [(0.5, -5.0, 1.0), (0.5, 10.0, 1.0)]),
    "both mixtures": (
        [(0.2, 0.0, 1.0), (0.3, 2.0, 0.3), (0.5, -1.0, 0.7)],
        [(0.5, 0.0, 0.5), (0.25, 2.2, 0.4), (0.25, 5.0, 3.0)],
    ),
    "p apart by 1e6": ([(0.5, 0.0, 1.0), (0.5, 1e6, 1.0)], [(1.0, 0.0, 1.0)]),
    "q apart by 1e6": ([(1.0, 0.1, 1.0)], [(0.5, -1e6, 1.0), (0.5, 1e6, 1.0)]),
    "needle in q": ([(1.0, 0.0, 1.0)], [(1 - 1e-12, 0.0, 1e-8), (1e-12, 0.0, 1.0)]),
    "needle far from the wide one": (
        [(0.3, 0.0, 1.0), (0.7, 1e3, 1e-8)],
        [(0.5, 1e3, 1e-8), (0.5, 0.0, 1.0)],
    ),
    "weight 1e-300": ([(1.0, 0.0, 1.0)], [(1.0, 0.0, 1e-2), (1e-300, 0.0, 1.0)]),
    "wide p": ([(0.5, 0.0, 1e8), (0.5, 1.0, 1.0)], [(0.5, 0.0, 1.0), (0.5, 20.0, 2.0)]),
    "offset 1e10": ([(0.5, 1e10, 1.0), (0.5, 1e10 + 6, 1.0)], [(1.0, 1e10 + 3, 3.0)]),
    "rare and far": ([(1 - 1e-9, 0.0, 1.0), (1e-9, 10.0, 1.0)], [(0.5, 3.0, 3.2), (0.5, 4.0, 0.1)]),
}


def near(step):
    """Pairs at a distance of about ``step``, with KL of about step^2."""
    return {
        "mixtures": (
            [(0.3, -2.0, 1.0), (0.7, 1.0, 0.5)],
            [(0.3 * (1 + step), -2.0 * (1 + step), 1.0 - step), (0.7, 1.0 + 3 * step, 0.5)],
        ),
        "mixture and gaussian": ([(0.25, step, 1.0), (0.75, 0.0, 1.0 + step)], [(1.0, 0.0, 1.0)]),
        "gaussian and mixture": ([(1.0, 0.0, 1.0)], [(0.25, step, 1.0), (0.75, 0.0, 1.0 + step)]),
        "components apart": ([(0.5, 0.0, 1.0), (0.5, 1e6, 1.0)], [(0.5, step, 1.0), (0.5, 1e6, 1.0 + step)]),
    }


def components(rows, **kwargs):
    table = torch.tensor(rows, dtype=torch.float64)
    return Components(torch.log_softmax(table[:, 0].log(), 0), table[:, 1:2].clone(), table[:, 2:].clone())


@functools.lru_cache
def rule(n, dps):
    with mp.workdps(dps + 10):
        nodes = []
        for i in range(n):
            x = mp.cos(mp.pi * (i + mp.mpf(3) / 4) / (n + mp.mpf(1) / 2))
            for _ in range(8):
                value = mp.legendre(n, x)
                slope = n * (x * value - mp.legendre(n - 1, x)) / (x * x - 1)
                x -= value / slope
            nodes.append((x, 2 / ((1 - x * x) * slope * slope)))
        return nodes


def exact(c):
    """The weights (normalised), means and scales that the float values stand for."""
    rows = [(mp.exp(mp.mpf(float(w))), mp.mpf(float(m)), mp.mpf(float(s))) for w, m, s in zip(*c, strict=True)]
    total = sum(w for w, _, _ in rows)
    return [(w / total, m, s) for w, m, s in rows if w > 0]


def log_density(x, rows):
    terms = [mp.log(w / s) - ((x - m) / s) ** 2 / 2 for w, m, s in rows]
    largest = max(terms)
    return largest + mp.log(sum(mp.exp(t - largest) for t in terms)) - mp.log(2 * mp.pi) / 2


def crossings(rows):
    for i, (wa, ma, sa) in enumerate(rows):
        for wb, mb, sb in rows[:i]:
            a, b = (1 / sb**2 - 1 / sa**2) / 2, ma / sa**2 - mb / sb**2
            c = mp.log(wa / wb * sb / sa) - ma**2 / sa**2 / 2 + mb**2 / sb**2 / 2
            for x in mp.polyroots([a, b, c], maxsteps=200, extraprec=200) if a else [-c / b] if b else []:
                slope = abs(mp.re(2 * a * x + b))
                if mp.im(x) == 0 and slope > 0:
                    yield from (mp.re(x) + t / slope for t in (-80, -30, -12, -5, 0, 5, 12, 30, 80))


def truth(p, q, dps=32, n=20, integrand=None):
    """The integral of p log(p/q) over 12 standard deviations around every component of p."""
    with mp.workdps(dps):
        rows_p, rows_q = exact(p), exact(q)

        def f(x):
            log_p = log_density(x, rows_p)
            return mp.exp(log_p) * (log_p - log_density(x, rows_q))

        steps = [mp.mpf(t) * 3 / 4 for t in range(-16, 17)]
        edges = {m + t * s for _, m, s in rows_p for t in steps}
        low, high = min(edges), max(edges)
        extra = [m + t * s for _, m, s in rows_q for t in steps]
        edges |= {x for x in (*extra, *crossings(rows_p), *crossings(rows_q)) if low < x < high}
        ordered = sorted(edges)
        total = mp.mpf(0)
        for a, b in pairwise(ordered):
            half, middle = (b - a) / 2, (a + b) / 2
            total += half * sum(w * f(middle + half * x) for x, w in rule(n, dps))
        return total


def mean_component_kl(p, q):
    """S, up to the weight of the nearest component of q: the scale of the bar."""
    total = 0.0
    for w, m, s in zip(*(t.flatten().tolist() for t in p), strict=True):
        each = [
            0.5 * ((s / b) ** 2 + ((m - c) / b) ** 2 - 1) + math.log(b / s) - v
            for v, c, b in zip(*(t.flatten().tolist() for t in q), strict=True)
        ]
        total += math.exp(w) * min(each)
    return max(total, 0.0)


def excess(p, q):
    """Error and estimated error, in units of the bar 1e-13 (1 + S)."""
    value, error = line_kl(p, q)
    bar = 1e-13 * (1 + mean_component_kl(p, q))
    return float(abs(mp.mpf(float(value)) - truth(p, q))) / bar, float(error) / bar


@pytest.mark.parametrize("name", CASES)
def test_value_and_its_error_bound(name):
    p, q = (components(c) for c in CASES[name])
    actual, estimated = excess(p, q)
    assert actual <= 0.05  # measured: 0.015 at most
    assert actual <= estimated <= 10.0


def test_kinks_must_have_their_own_panels(monkeypatch):
    p, q = (components(c) for c in CASES["weight 1e-300"])
    monkeypatch.setattr(line, "_kinks", lambda inputs: None)
    actual, estimated = excess(p, q)
    assert actual > 1e6
    assert estimated > 10.0  # and the error estimate says so


def test_abscissae_must_have_a_lower_half(monkeypatch):
    p, q = (components(c) for c in CASES["needle far from the wide one"])
    panel_rule = line.panel_rule

    def single(high, low, n):
        high, low, weight, width = panel_rule(high, low, n)
        return high, torch.zeros_like(low), weight, width

    monkeypatch.setattr(line, "panel_rule", single)
    assert excess(p, q)[0] > 1e3


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_truth_does_not_depend_on_its_precision_or_its_rule(name):
    p, q = (components(c) for c in CASES[name])
    first, second = truth(p, q), truth(p, q, dps=50, n=28)
    assert abs(first - second) <= 1e-18 * (1 + abs(second))


NEAR = [(name, step) for step in (1e-3, 1e-6, 1e-9) for name in near(step)]


@pytest.mark.parametrize(("name", "step"), NEAR)
def test_relative_accuracy_near_equality(name, step):
    p, q = (components(c) for c in near(step)[name])
    value, error = line_kl(p, q)
    expected = truth(p, q, dps=50)
    actual = abs(mp.mpf(float(value)) / expected - 1)
    assert actual <= 1e-11  # measured: 7e-15 at most
    assert actual * expected <= float(error) <= 1e-11 * expected + 1e-30


def test_log_density_differences_fail_near_equality():
    relative = {}
    for step in (1e-9, 1e-13):
        p, q = (components(c) for c in near(step)["mixtures"])
        inputs = (p.log_weights, p.loc[:, 0], p.scale[:, 0], q.log_weights, q.loc[:, 0], q.scale[:, 0])
        high, low, weight, _ = (x.flatten() for x in line._rule(inputs))
        log_p, log_q = (
            line._logsumexp(line._component_log_densities(*rows, high, low)[0]) for rows in (inputs[:3], inputs[3:])
        )
        expected = float(truth(p, q, dps=60))
        integrands = {
            "textbook": log_p.exp() * (log_p - log_q),
            "positive": line._integrand(log_p - log_q, log_p.exp(), log_q.exp()),
        }
        for name, f in integrands.items():
            relative[name, step] = abs(float((weight * f).sum()) / expected - 1)
        relative["ours", step] = abs(float(line_kl(p, q)[0]) / expected - 1)
    assert relative["textbook", 1e-9] > 1.0
    assert relative["positive", 1e-13] > 1e-6
    assert max(relative["ours", step] for step in (1e-9, 1e-13)) < 1e-14


@pytest.mark.parametrize("kp", [1, 2, 5])
@pytest.mark.parametrize("full", [False, True])
def test_equal_parameters_give_zero_with_zero_gradient(kp, full):
    generator = torch.Generator().manual_seed(kp)
    lw = torch.log_softmax(torch.randn(3, kp, generator=generator, dtype=torch.float64), -1)
    loc = 1e5 * torch.randn(3, kp, 1, generator=generator, dtype=torch.float64)
    scale = torch.exp(torch.randn(3, kp, 1, generator=generator, dtype=torch.float64))
    p = [t.clone().requires_grad_() for t in (lw, loc, scale.unsqueeze(-1) if full else scale)]
    q = [t.detach().clone().requires_grad_() for t in p]
    value, _ = line_kl(Components(*p), Components(*q))
    assert value.tolist() == [0.0, 0.0, 0.0]
    for g in torch.autograd.grad(value.sum(), p + q):
        assert torch.equal(g, torch.zeros_like(g))


def test_identical_components_and_one_gaussian_give_zero():
    p = components([(0.25, 3.0, 2.0), (0.75, 3.0, 2.0)])
    q = components([(1.0, 3.0, 2.0)])
    assert float(line_kl(p, q)[0]) == 0.0
    assert float(line_kl(q, p)[0]) == 0.0


@pytest.mark.parametrize("side", ["p", "q"])
def test_a_weight_of_zero_is_as_good_as_no_component(side):
    rows = [(0.5, 0.0, 1.0), (0.5, 4.0, 2.0)]
    other = components([(0.4, 1.0, 1.5), (0.6, -1.0, 1.0)])
    padded = components([*rows, (0.0, 100.0, 1e-3)])
    plain = components(rows)
    leaves = [t.clone().requires_grad_() for t in padded]
    if side == "p":
        value, expected = line_kl(Components(*leaves), other)[0], line_kl(plain, other)[0]
    else:
        value, expected = line_kl(other, Components(*leaves))[0], line_kl(other, plain)[0]
    assert abs(float(value.detach() - expected)) < 1e-14
    for g in torch.autograd.grad(value, leaves):
        assert torch.isfinite(g).all()
        assert not g[2].any()


def gradient_truth(p, q, dps=40, n=20):
    """Derivatives of the integral of p log(p/q) - p + q at the log-weights, means and scales."""
    with mp.workdps(dps):
        sides = [
            [tuple(map(mp.mpf, row)) for row in zip(*(t.flatten().tolist() for t in c), strict=True)] for c in (p, q)
        ]
        steps = [mp.mpf(t) for t in range(-13, 14)]
        edges = sorted({m + t * s for side in sides for _, m, s in side for t in steps})
        total = mp.matrix(3 * sum(map(len, sides)), 1)
        for a, b in pairwise(edges):
            for node, weight in rule(n, dps):
                x = (a + b) / 2 + (b - a) / 2 * node
                parts = [
                    [(mp.exp(w - ((x - m) / s) ** 2 / 2) / s / mp.sqrt(2 * mp.pi), (x - m) / s, s) for w, m, s in side]
                    for side in sides
                ]
                density_p, density_q = (sum(d for d, _, _ in part) for part in parts)
                factors = mp.log(density_p / density_q), 1 - density_p / density_q
                row = [
                    f * d * g
                    for f, part in zip(factors, parts, strict=True)
                    for d, z, s in part
                    for g in (1, z / s, (z * z - 1) / s)
                ]
                total += (b - a) / 2 * weight * mp.matrix(row)
        return [float(x) for x in total]


@pytest.mark.parametrize("step", [1.0, 1e-4, 1e-10])
def test_gradient(step):
    p = components([(0.25, -2.0, 1.0), (0.75, 1.0, 0.5)])
    q = components([(0.25, -2.0 - 0.5 * step, 1.0), (0.75, 1.0 + step, 0.5 + step)])
    leaves = [t.clone().requires_grad_() for t in (*p, *q)]
    value, _ = line_kl(Components(*leaves[:3]), Components(*leaves[3:]))
    grads = [g.flatten() for g in torch.autograd.grad(value, leaves)]
    actual = torch.cat([torch.stack(grads[:3], -1).flatten(), torch.stack(grads[3:], -1).flatten()])
    expected = torch.tensor(gradient_truth(p, q), dtype=torch.float64)
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-14


def random(kp, kq, rows=3):
    generator = torch.Generator().manual_seed(10 * kp + kq)

    def side(k):
        return [
            torch.randn(rows, k, generator=generator, dtype=torch.float64),
            2 * torch.randn(rows, k, 1, generator=generator, dtype=torch.float64),
            torch.exp(0.5 * torch.randn(rows, k, 1, generator=generator, dtype=torch.float64)),
        ]

    return side(kp) + side(kq)


def from_logits(*x):
    p = Components(torch.log_softmax(x[0], -1), *x[1:3])
    return line_kl(p, Components(torch.log_softmax(x[3], -1), *x[4:]))[0]


# torch's own forward mode, on first use
@pytest.mark.parametrize(("kp", "kq"), [(1, 1), (3, 1), (1, 2), (2, 2), (2, 3)])
def test_derivatives_and_transforms(kp, kq):
    x = random(kp, kq, rows=2)
    leaves = [t.clone().requires_grad_() for t in x]
    assert torch.autograd.gradcheck(from_logits, leaves, rtol=1e-6, atol=1e-8)
    if (kp, kq) in ((3, 1), (2, 3)):
        assert torch.autograd.gradgradcheck(from_logits, leaves, rtol=1e-5, atol=1e-6, fast_mode=True)
    value = from_logits(*leaves)
    grads = torch.autograd.grad(value.sum(), leaves)
    assert torch.equal(torch.vmap(from_logits)(*x), value.detach())
    for row, g in zip(torch.vmap(torch.func.jacrev(from_logits, argnums=tuple(range(6))))(*x), grads, strict=True):
        assert torch.allclose(row, g, rtol=1e-12, atol=1e-14)
    tangents = [torch.ones_like(t) for t in x]
    _, tangent = torch.func.jvp(from_logits, tuple(x), tuple(tangents))
    assert torch.allclose(tangent.sum(), sum(g.sum() for g in grads), rtol=1e-11, atol=1e-12)


def test_blocks_do_not_change_the_result(monkeypatch):
    x = random(3, 2, rows=5)
    leaves = [t.clone().requires_grad_() for t in x]
    whole = from_logits(*leaves)
    expected = torch.autograd.grad(whole.sum(), leaves)
    monkeypatch.setattr(line, "BLOCK", 2**13)
    blocked = from_logits(*leaves)
    assert torch.allclose(whole, blocked, rtol=1e-14, atol=0)
    for a, b in zip(torch.autograd.grad(blocked.sum(), leaves), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_no_rows():
    p = Components(*(torch.ones(0, *s, dtype=torch.float64) for s in ((2,), (2, 1), (2, 1))))
    assert line_kl(p, p)[0].shape == (0,)


@pytest.mark.parametrize("k", [12, pytest.param(64, marks=pytest.mark.slow)])
def test_many_components_agree_with_finer_panels(k, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def side():
        return Components(
            torch.log_softmax(2 * torch.randn(k, generator=generator, dtype=torch.float64), -1),
            20 * torch.randn(k, 1, generator=generator, dtype=torch.float64),
            torch.exp(torch.randn(k, 1, generator=generator, dtype=torch.float64)),
        )

    p, q = side(), side()
    value, error = line_kl(p, q)
    monkeypatch.setattr(line, "NODES", 32)
    monkeypatch.setattr(line, "KINKS", 10)
    finer, _ = line_kl(p, q)
    assert abs(float(value - finer)) <= float(error) <= 1e-12 * (1 + float(value))


# torch.compile instantiates autograd functions, against its own advice
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_traced_whole_by_torch_compile():
    x = random(2, 3)
    leaves = [t.clone().requires_grad_() for t in x]
    compiled = torch.compile(from_logits, fullgraph=True)(*leaves)
    eager = from_logits(*leaves)
    assert torch.allclose(compiled, eager, rtol=1e-14, atol=1e-15)
    for a, b in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
