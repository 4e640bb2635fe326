"""Functions that torch.compile takes as one operation, and those evaluated for some rows alone."""

from __future__ import annotations

import torch

import stablekl
from stablekl._opaque import opaque, where_needed

SEEN = []


@opaque(2)
def sum_and_product(x, y):
    SEEN.append(x.shape)
    return x + y, x * y


@where_needed
def precise(x, y):
    SEEN.append(x.shape)
    return 10 * x + y


def test_eager_and_compiled_agree():
    x, y = torch.rand(3, 1), torch.rand(4)
    compiled = torch.compile(lambda x, y: sum_and_product(x, 2 * y), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, y), sum_and_product(x, 2 * y), strict=True):
        assert a.shape == (3, 4)
        assert torch.equal(a, b)


def test_vmap_within_compile():
    x, y = torch.rand(5, 3), torch.rand(3)
    f = torch.vmap(sum_and_product, in_dims=(1, 0))
    expected = torch.vmap(sum_and_product, in_dims=(1, 0))(x, y)
    for a, b in zip(torch.compile(f, backend="aot_eager")(x, y), expected, strict=True):
        assert torch.equal(a, b)


def test_only_the_rows_of_the_mask_are_evaluated():
    otherwise, mask = torch.zeros(2, 3), torch.tensor([[True, False, False], [False, True, True]])
    x, y = torch.rand(2, 3), torch.rand(3)
    expected = torch.where(mask, 10 * x + y, otherwise)
    for g in (precise, torch.compile(precise, fullgraph=True, backend="aot_eager")):
        SEEN.clear()
        assert torch.equal(g(otherwise, mask, x, y), expected)
        assert SEEN == [(3,)]
    assert torch.equal(torch.vmap(precise)(otherwise, mask, x, y.expand(2, 3)), expected)
    SEEN.clear()
    assert torch.equal(precise(otherwise, mask & False, x, y), otherwise)
    assert not SEEN
    assert precise(torch.tensor(0.0), torch.tensor(True), torch.tensor(1.0), torch.tensor(2.0)) == 12
    assert precise(torch.zeros(0), torch.zeros(0) > 0, torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_a_rule_traces_to_few_operations():
    a, b, y = (torch.tensor([v], dtype=torch.float64) for v in (2.0, 3.0, 0.7))

    def rule(a, b, y):
        p, q = stablekl.Beta(a, b, validate_args=False), stablekl.ContinuousBernoulli(logits=y)
        return torch.distributions.kl_divergence(p, q)

    torch._dynamo.reset()
    sizes, expected = [], rule(a, b, y)

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    torch.testing.assert_close(torch.compile(rule, fullgraph=True, backend=backend)(a, b, y), expected)
    assert sum(sizes) < 3000  # 24,000 where numbers in twice the digits are traced
