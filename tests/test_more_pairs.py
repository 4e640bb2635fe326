"""KL divergences of more pairs that torch has no rule for: other spellings, Weibull, half-normal and log-normal."""

from __future__ import annotations

import pytest
import torch
from torch import distributions

import stablekl

F64 = torch.float64


# ---- one distribution, two classes --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [distributions, stablekl])
def test_one_hot_and_integers_are_the_same_categories(module):
    x, y = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]), torch.tensor([0.4, 0.5, 0.1])
    expected = stablekl.kl_divergence(module.Categorical(x), module.Categorical(y))
    for p, q in ((module.OneHotCategorical, module.Categorical), (module.Categorical, module.OneHotCategorical)):
        assert torch.equal(distributions.kl_divergence(p(x, validate_args=False), q(y, validate_args=False)), expected)
    with pytest.raises(ValueError, match="3 categories and q has 2"):
        distributions.kl_divergence(module.OneHotCategorical(y), module.Categorical(y[:2]))


@pytest.mark.parametrize("module", [distributions, stablekl])
def test_beta_is_the_first_coordinate_of_a_dirichlet(module):
    a, b = torch.tensor([[2.0, 1e6], [3.0, 0.5]]), torch.tensor([0.7, 1e6 + 100])
    p, q = module.Beta(a, 1.5), module.Beta(b, 2.5)
    as_p, as_q = (module.Dirichlet(torch.stack([d.concentration1, d.concentration0], -1)) for d in (p, q))
    expected = stablekl.kl_divergence(p, q)
    assert expected.shape == (2, 2)
    assert torch.equal(distributions.kl_divergence(p, as_q), expected)
    assert torch.equal(distributions.kl_divergence(as_p, q), expected)
    # the order of the concentrations, by torch's own densities
    x = torch.tensor(0.3)
    torch.testing.assert_close(as_q.log_prob(torch.stack([x, 1 - x], -1)), q.log_prob(x))
    three = module.Dirichlet(torch.ones(3))
    for pair in ((p, three), (three, q)):
        with pytest.raises(ValueError, match="3 categories"):
            distributions.kl_divergence(*pair)
