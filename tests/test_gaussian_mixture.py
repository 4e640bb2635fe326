"""stablekl.GaussianMixture: built from parameters, read as torch's classes."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import mpmath as mp
import pytest
import torch
from torch.distributions import Categorical, MultivariateNormal

import stablekl
from stablekl import GaussianMixture

F64 = torch.float64
EPS = torch.finfo(F64).eps
T = torch.tensor
LOC = T([[0.0, 0.0], [3.0, 1.0], [-1.0, 2.0]], dtype=F64)
COV = torch.stack([torch.eye(2, dtype=F64) * (k + 1) + 0.3 for k in range(3)])
PROBS = T([0.2, 0.3, 0.5], dtype=F64)
SCALES = {
    "covariance_matrix": COV,
    "scale_tril": torch.linalg.cholesky(COV),
    "scale_diag": COV.diagonal(dim1=-2, dim2=-1).sqrt(),
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("weights", ["probs", "logits"])
def test_it_is_what_torch_would_build(kind, weights):
    given = PROBS if weights == "probs" else PROBS.log() + 7.0
    m = GaussianMixture(**{weights: given, "loc": LOC, kind: SCALES[kind]})
    cov = torch.diag_embed(SCALES[kind] ** 2) if kind == "scale_diag" else COV
    twin = torch.distributions.MixtureSameFamily(Categorical(PROBS), MultivariateNormal(LOC, cov))
    assert isinstance(m, stablekl.MixtureSameFamily)
    assert isinstance(m.mixture_distribution, Categorical)
    assert isinstance(m.component_distribution, MultivariateNormal)
    assert torch.equal(m.component_distribution.loc, LOC)
    torch.testing.assert_close(m.component_distribution.scale_tril, torch.linalg.cholesky(cov))
    torch.testing.assert_close(m.mixture_distribution.probs, PROBS)
    torch.testing.assert_close(m.log_weights, PROBS.log())
    x = 3 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(m.log_prob(x), twin.log_prob(x))
    torch.testing.assert_close(m.mean, twin.mean)
    torch.testing.assert_close(m.variance, twin.variance)
    assert m.sample((4,)).shape == (4, 2)
    assert repr(m).startswith("GaussianMixture(\n  Categorical(")


def test_moments_and_the_matching_gaussian():
    m = GaussianMixture(probs=PROBS, loc=LOC, covariance_matrix=COV)
    torch.manual_seed(0)
    x = m.sample((200_000,))
    torch.testing.assert_close(m.covariance_matrix, torch.cov(x.mT), rtol=0.02, atol=0.02)
    q = m.to_mvn()
    assert torch.equal(q.mean, m.mean)
    torch.testing.assert_close(q.covariance_matrix, m.covariance_matrix)
    best = torch.distributions.kl_divergence(m, q)
    for shift, factor in ((0.1, 1.0), (0.0, 1.1), (0.0, 0.9)):
        other = MultivariateNormal(m.mean + shift, factor * m.covariance_matrix)
        assert torch.distributions.kl_divergence(m, other) > best


def test_unnormalised_and_zero_weights():
    m = GaussianMixture(probs=T([1.0, 0.0, 3.0], dtype=F64), loc=LOC, covariance_matrix=COV)
    torch.testing.assert_close(m.log_weights, T([0.25, 0.0, 0.75], dtype=F64).log(), rtol=1e-14, atol=0)
    n = GaussianMixture(logits=m.log_weights, loc=LOC, covariance_matrix=COV)
    alive = GaussianMixture(probs=T([1.0, 3.0], dtype=F64), loc=LOC[[0, 2]], covariance_matrix=COV[[0, 2]])
    for x in (LOC, LOC + 5, LOC * 1e6):
        torch.testing.assert_close(m.log_prob(x), alive.log_prob(x), rtol=1e-15, atol=0)
        torch.testing.assert_close(n.log_prob(x), alive.log_prob(x), rtol=1e-15, atol=0)
    assert float(m.posterior_marginal(LOC).probs[:, 1].abs().max()) == 0


@pytest.mark.parametrize("weights", ["probs", "logits"])
def test_gradients_with_a_zero_weight(weights):
    given = T([0.25, 0.0, 0.75], dtype=F64)
    leaves = [given if weights == "probs" else given.log(), LOC.clone(), SCALES["scale_diag"].clone()]
    leaves = [x.requires_grad_() for x in leaves]
    m = GaussianMixture(**{weights: leaves[0]}, loc=leaves[1], scale_diag=leaves[2])
    for value in (m.log_prob(LOC.detach()).sum(), m.mean.sum(), m.variance.sum(), m.covariance_matrix.sum()):
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in grads if g is not None)
        assert float(grads[1][1].abs().max()) == 0


@pytest.mark.parametrize(
    "transport", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.expand((3,))]
)
@pytest.mark.parametrize("kind", SCALES)
def test_transport(kind, transport):
    m = GaussianMixture(probs=T([1.0, 0.0, 3.0], dtype=F64), loc=LOC, **{kind: SCALES[kind]})
    new = transport(m)
    assert type(new) is GaussianMixture
    x = LOC[0] + 1
    assert torch.equal(new.log_prob(x), m.log_prob(x).expand(new.batch_shape))
    single = new.to(torch.float32)
    assert type(single) is GaussianMixture
    assert single.log_prob(x.float()).dtype == single.log_weights.dtype == single.sample().dtype == torch.float32
    torch.testing.assert_close(single.log_prob(x.float()), new.log_prob(x).float())
    assert (
        float(single.log_weights.max(-2).values.min() if single.batch_shape else single.log_weights.min()) == -math.inf
    )


def test_batches():
    m = GaussianMixture(probs=torch.rand(5, 1, 3), loc=torch.randn(4, 3, 2), scale_diag=torch.ones(3, 2))
    assert m.batch_shape == (5, 4)
    assert m.log_weights.shape == (5, 4, 3)
    assert m.log_prob(torch.zeros(7, 1, 1, 2)).shape == (7, 5, 4)
    assert m.sample((2,)).shape == (2, 5, 4, 2)


# Where each weight counts: accuracy of the density under the smallest weight that is not zero
def test_tiny_weights_count():
    logits = T([0.0, -200.0], dtype=F64)
    m = GaussianMixture(logits=logits, loc=T([[0.0], [60.0]], dtype=F64), scale_diag=torch.ones(2, 1, dtype=F64))
    x = T([60.0], dtype=F64)
    assert float(m.log_prob(x)) == pytest.approx(-200.0 - 0.5 * math.log(2 * math.pi), rel=1e-15)
    probs = GaussianMixture(
        probs=logits.exp(), loc=m.component_distribution.loc, scale_diag=torch.ones(2, 1, dtype=F64)
    )
    torch.testing.assert_close(probs.log_prob(x), m.log_prob(x), rtol=1e-14, atol=0)


BAD = {
    "neither weights": ({}, "exactly one of logits and probs; got neither"),
    "both weights": ({"probs": PROBS, "logits": PROBS}, "got both"),
    "too few weights": ({"probs": PROBS[:2]}, r"\(K,\) with K = 3 as in loc, got \(2,\)"),
    "no means": ({"probs": PROBS, "loc": None}, "loc must have shape"),
    "a list": ({"probs": [0.5, 0.2, 0.3]}, "probs must be a tensor"),
    "one mean": ({"probs": PROBS, "loc": LOC[0]}, "loc must have shape"),
    "two scales": ({"probs": PROBS, "scale_tril": SCALES["scale_tril"]}, "scale_tril and scale_diag|exactly one"),
    "negative weight": ({"probs": T([0.5, -0.1, 0.6], dtype=F64)}, r"probs has the value -0.1 at \[1\]"),
    "infinite weight": ({"probs": T([0.5, math.inf, 0.6], dtype=F64)}, r"probs has the value inf at \[1\]"),
    "no weight": ({"probs": torch.zeros(3, dtype=F64)}, "all probs are 0"),
    "NaN logit": ({"logits": T([[0.0, 0.0, math.nan]] * 2, dtype=F64)}, r"logits has the value nan at \[0, 2\]"),
    "infinite logit": ({"logits": T([0.0, math.inf, 0.0], dtype=F64)}, r"logits has the value inf at \[1\]"),
    "no logit": ({"logits": torch.full((2, 3), -math.inf, dtype=F64)}, r"all logits are -inf in the mixture at \[0\]"),
    "zero scale": (
        {"probs": PROBS, "scale_diag": T([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=F64)},
        r"scale_diag\[1, 1\] is 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_and_where(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**{"loc": LOC, "scale_diag": SCALES["scale_diag"], **change})


def test_validation_can_be_switched_off():
    m = GaussianMixture(probs=PROBS, loc=LOC, scale_diag=SCALES["scale_diag"], validate_args=False)
    assert bool(m.log_prob(T([math.nan, 0.0], dtype=F64)).isnan())


# -------------------------------------------------------------------------------------------------- from_eigh


def _spectrum(condition: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(1, 5, 5, generator=g, dtype=F64))[0]
    values = torch.logspace(0, -math.log10(condition), 5, dtype=F64)[torch.randperm(5, generator=g)]
    return torch.randn(1, 5, generator=g, dtype=F64), values[None], vectors


@pytest.mark.parametrize("condition", [1e2, 1e8, 1e12])
def test_from_eigh_against_mpmath(condition):
    """Log-density and KL to the condition number of the factor; must fail: the Cholesky factor of the covariance."""
    kappa, failed = math.sqrt(condition), 0.0
    with mp.workdps(80):
        problems = []
        for seed in range(4):
            loc, values, vectors = _spectrum(condition, seed)
            v = mp.matrix(vectors[0].tolist())
            problems.append((loc, values, vectors, v * mp.diag(values[0].tolist()) * v.T))
        for (loc, values, vectors, s), (loc_q, values_q, vectors_q, s_q) in itertools.pairwise(problems):
            ones = torch.ones(1, dtype=F64)
            m = GaussianMixture.from_eigh(probs=ones, loc=loc, eigenvalues=values, eigenvectors=vectors)
            q = GaussianMixture.from_eigh(probs=ones, loc=loc_q, eigenvalues=values_q, eigenvectors=vectors_q)
            x = loc[0] + vectors[0] @ values[0].sqrt()
            d = mp.matrix(x.tolist()) - mp.matrix(loc[0].tolist())
            truth = -((d.T * mp.inverse(s) * d)[0] + mp.log(mp.det(s)) + 5 * mp.log(2 * mp.pi)) / 2
            assert abs(m.log_prob(x).item() / truth - 1) < 64 * EPS * kappa
            factor = m.component_distribution.scale_tril[0]
            log_det = 2 * sum(mp.log(mp.mpf(y)) for y in factor.diagonal().tolist())
            assert abs(log_det - mp.log(mp.det(s))) < 16 * EPS
            precision = mp.inverse(s_q)
            d = mp.matrix(loc[0].tolist()) - mp.matrix(loc_q[0].tolist())
            product = precision * s
            kl = sum(product[i, i] for i in range(5)) + (d.T * precision * d)[0] - 5 + mp.log(mp.det(s_q) / mp.det(s))
            p, q = (y.component_distribution for y in (m, q))
            assert abs(torch.distributions.kl_divergence(p, q).item() / (kl / 2) - 1) < 64 * EPS * kappa
            covariance = vectors * values.unsqueeze(-2) @ vectors.mT
            naive, info = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.mT))
            naive = naive[0].diagonal().log().sum().item()
            failed = max(failed, math.inf if int(info) else float(abs(2 * naive - mp.log(mp.det(s)))))
    assert failed > 64 * EPS * kappa or condition == 1e2


def test_from_eigh_is_the_covariance():
    values, vectors = torch.linalg.eigh(COV)
    m = GaussianMixture.from_eigh(PROBS.log(), None, LOC, values, vectors)
    torch.testing.assert_close(m.component_distribution.covariance_matrix, COV)
    assert type(m) is GaussianMixture
    single = GaussianMixture.from_eigh(probs=PROBS.float(), loc=LOC.float(), eigenvalues=values.float(),
                                       eigenvectors=vectors.float())  # fmt: skip
    assert single.component_distribution.scale_tril.dtype == torch.float32
    leaves = [x.clone().requires_grad_() for x in (values, vectors)]

    def f(values, vectors):
        return GaussianMixture.from_eigh(
            probs=PROBS, loc=LOC, eigenvalues=values, eigenvectors=vectors, validate_args=False
        ).log_prob(LOC)

    assert torch.autograd.gradcheck(f, leaves)
    torch.testing.assert_close(torch.vmap(f)(values[None], vectors[None]), f(values, vectors)[None])


def test_from_eigh_errors():
    values, vectors = torch.linalg.eigh(COV)
    make = lambda **changed: GaussianMixture.from_eigh(  # noqa: E731
        **{"probs": PROBS, "loc": LOC, "eigenvalues": values, "eigenvectors": vectors, **changed}
    )
    bad = values.clone()
    bad[1, 0] = -1e-17
    with pytest.raises(ValueError, match=r"eigenvalues has the value -1e-17 at \[1, 0\]"):
        make(eigenvalues=bad)
    bad = vectors.clone()
    bad[2, :, 1] *= 1.001
    with pytest.raises(ValueError, match=r"eigenvectors at \[2\] are not orthonormal.* 0.002"):
        make(eigenvectors=bad)
    with pytest.raises(ValueError, match="give all three"):
        make(eigenvalues=None)
    with pytest.raises(ValueError, match=r"eigenvalues must have shape.*got \(3, 1\)"):
        make(eigenvalues=values[:, :1])
    with pytest.raises(ValueError, match="eigenvalues must be a tensor"):
        make(eigenvalues=values.tolist())


def test_integers_are_numbers():
    """Weights of 1 and 3 had log-weights of -1 and 0."""
    loc, scale = T([[0], [4]]), torch.ones(2, 1)
    for weights in ({"probs": T([1, 3])}, {"logits": T([0, 2])}):
        m = GaussianMixture(**weights, loc=loc, scale_diag=scale)
        [(name, given)] = weights.items()
        other = GaussianMixture(**{name: given.float()}, loc=loc.float(), scale_diag=scale)
        for f in ("log_weights", "mean", "variance"):
            torch.testing.assert_close(getattr(m, f), getattr(other, f), rtol=0, atol=0)
        assert m.sample((2,)).dtype == m.component_log_probs(torch.zeros(1)).dtype == torch.float32


def test_bfloat16_weights_need_not_add_up():
    """Torch's simplex allows a sum that is 1e-6 off; dividing by the sum in bfloat16 leaves 4e-3."""
    for seed in range(20):
        probs = torch.rand(7, generator=torch.Generator().manual_seed(seed)).bfloat16()
        m = GaussianMixture(probs=probs, loc=torch.zeros(7, 1).bfloat16(), scale_diag=torch.ones(7, 1).bfloat16())
        torch.testing.assert_close(m.log_weights.double().exp().sum(), T(1.0, dtype=F64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)])
def test_nothing_of_anything(batch):
    loc, tril = torch.zeros(*batch, 2, 3), torch.eye(3).expand(*batch, 2, 3, 3)
    m = GaussianMixture(torch.zeros(*batch, 2, requires_grad=True), loc=loc, scale_tril=tril)
    x = torch.zeros(*batch, 3)
    for value in (m.log_prob(x), m.log_inner_product(m), m.reduce(1).kl_bound, m.posterior_mode(x), m.entropy()):
        assert value.shape == batch
    for other in (m.marginal([0]), m.condition([1], x[..., :1]), m.product(m), m.to_mvn(), m.reduce(1).mixture):
        assert other.batch_shape == batch
    for value in (m.mean, m.variance, m.sample(), m.rsample()):
        assert value.shape == (*batch, 3)
    normal = stablekl.MultivariateNormal(torch.zeros(3), torch.eye(3))
    bounds = stablekl.kl_bounds(m, normal)
    assert bounds.lower.shape == bounds.upper.shape == stablekl.kl_divergence(m, normal).shape == batch
    diagonal = GaussianMixture(torch.zeros(*batch, 2), loc=loc, scale_diag=torch.ones(*batch, 2, 3))
    assert diagonal.log_cdf(x).shape == batch
    m.log_prob(x).sum().backward()


def test_no_points():
    m = GaussianMixture(torch.zeros(2), loc=torch.zeros(2, 3, requires_grad=True), scale_diag=torch.ones(2, 3))
    x = torch.zeros(0, 3)
    for value in (m.log_prob(x), m.posterior_mode(x), m.log_cdf(x), m.cdf(x)):
        assert value.shape == (0,)
    assert m.condition([0], x[:, :1]).batch_shape == (0,)
    for value in (m.sample((0,)), m.rsample((0,)), m.expand((4,)).sample((2, 0))):
        assert value.shape[-1] == 3
        assert value.numel() == 0
    m.rsample((0,)).sum().backward()
    assert m.stratified_sample((0,)).shape == (0, 2, 3)
