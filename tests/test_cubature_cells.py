"""The boxes of cubature: what they leave out, and what is counted for it."""

from __future__ import annotations

import math

import torch

from stablekl.mixtures.components import Components
from stablekl.mixtures.engines import cubature_nodes
from stablekl.mixtures.engines.cubature import cubature_information
from stablekl.mixtures.engines.spectral import label_information

F64 = torch.float64
POINTS = 10**7


def nested(dim, ratio=0.05):
    """Concentric components, each narrower than the one before."""
    scale = ratio ** torch.arange(4, dtype=F64)
    loc = torch.tensor([0.3, -0.2, 0.1], dtype=F64)[:dim].expand(4, dim).contiguous()
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    return Components(weights.log(), loc, scale.unsqueeze(-1).expand(4, dim).contiguous())


def test_components_that_cannot_matter_change_nothing(monkeypatch):
    p = nested(2)
    results = {}
    for faint in (-math.inf, cubature_nodes.FAINT, -3.0):
        monkeypatch.setattr(cubature_nodes, "FAINT", faint)
        x = [t.clone().requires_grad_() for t in p]
        value, _ = cubature_information(Components(*x), atol=1e-8, max_points=POINTS)
        results[faint] = [value.detach(), *torch.autograd.grad(value, x)]
    everything, result, too_few = results.values()
    for a, b in zip(result, everything, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-12)
    assert abs(float(too_few[0] - everything[0])) > 1e-5


def test_what_hides_in_too_few_boxes_is_counted():
    p = nested(3)
    truth, _ = cubature_information(p, atol=1e-7, max_points=POINTS)
    for points in (10**4, 10**5, 3 * 10**5):
        value, error = cubature_information(p, atol=1e-7, max_points=points)
        assert abs(float(value - truth)) + 1e-7 <= float(error)


def test_a_component_too_small_to_matter_needs_no_boxes():
    """In the wide one's frame a ball of 3e-16 of the volume holds nothing; its own mass is in its own frame."""
    p = Components(
        torch.tensor([0.9, 0.1], dtype=F64).log(),
        torch.tensor([[0.0, 0.0, 0.0], [0.7, 0.4, -0.2]], dtype=F64),
        torch.tensor([[1.0] * 3, [7e-6] * 3], dtype=F64),
    )
    value, error = cubature_information(p, atol=1e-7, max_points=2**19)
    assert abs(float(value - label_information(p))) <= float(error) <= 1e-7
