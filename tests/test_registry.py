"""What importing stablekl changes in torch's registry (nothing of torch's own), and what harden() does and undoes."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence, register_kl
from torch.distributions import LowRankMultivariateNormal as LowRank
from torch.distributions.kl import _KL_REGISTRY

import stablekl

NARROW, UNIT = Normal(0.0, 1e-25), Normal(0.0, 1.0)
TORCHS = (Normal, MultivariateNormal, LowRank, Independent)


def hardened():
    return bool(kl_divergence(NARROW, UNIT).isfinite())


@pytest.fixture(autouse=True)
def _torchs_rules_before_and_after():
    before = dict(_KL_REGISTRY)
    assert not hardened()
    yield
    assert dict(_KL_REGISTRY) == before


def test_import_adds_rules_and_replaces_none():
    code = """
from torch.distributions.kl import _KL_REGISTRY
before = dict(_KL_REGISTRY)
import stablekl
assert all(_KL_REGISTRY[pair] is rule for pair, rule in before.items())
assert len(_KL_REGISTRY) > len(before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_our_classes_and_kl_divergence_need_no_hardening():
    assert kl_divergence(stablekl.Normal(0.0, 1e-25), UNIT).isfinite()
    assert kl_divergence(NARROW, stablekl.Normal(0.0, 1.0)).isfinite()
    assert stablekl.kl_divergence(NARROW, UNIT).isfinite()


def test_context_manager_and_call():
    with stablekl.harden() as period:
        assert hardened()
        assert isinstance(period, stablekl.registry.Hardening)
    assert not hardened()
    period = stablekl.harden()
    assert hardened()
    period.restore()
    assert not hardened()
    period.restore()
    assert not hardened()


def test_an_exception_restores():
    with pytest.raises(KeyError), stablekl.harden():
        raise KeyError
    assert not hardened()


def test_nested_and_out_of_order():
    with stablekl.harden():
        with stablekl.harden():
            assert hardened()
        assert hardened()
    assert not hardened()
    first, second = stablekl.harden(), stablekl.harden()
    first.restore()
    assert hardened(), "the second period has not ended"
    first.restore()
    assert hardened(), "nor has it after a repeated restore of the first"
    second.restore()
    assert not hardened()


def test_every_torch_pair_is_replaced_and_comes_back():
    with stablekl.harden():
        for pair in (
            (Normal, Normal),
            (MultivariateNormal, MultivariateNormal),
            (LowRank, LowRank),
            (Independent,) * 2,
        ):
            assert _KL_REGISTRY[pair].__module__.startswith("stablekl.")
    for pair in ((Normal, Normal), (MultivariateNormal, MultivariateNormal), (LowRank, LowRank), (Independent,) * 2):
        assert _KL_REGISTRY[pair].__module__.startswith("torch.")


def test_a_rule_registered_by_others_in_the_meantime_survives():
    torchs = _KL_REGISTRY[Normal, Normal]
    try:
        with stablekl.harden():

            @register_kl(Normal, Normal)
            def theirs(p, q):
                return torch.tensor(42.0)

            assert kl_divergence(NARROW, UNIT) == 42
            with stablekl.harden():
                assert hardened()
                assert kl_divergence(NARROW, UNIT) != 42
        assert kl_divergence(NARROW, UNIT) == 42
        assert _KL_REGISTRY[MultivariateNormal, MultivariateNormal].__module__.startswith("torch.")
    finally:
        _KL_REGISTRY[Normal, Normal] = torchs
        torch.distributions.kl._KL_MEMOIZE.clear()


def test_a_rule_for_a_subclass_wins_over_ours():
    class Theirs(Normal):
        pass

    register_kl(Theirs, Normal)(lambda p, q: torch.tensor(42.0))
    try:
        assert stablekl.kl_divergence(Theirs(0.0, 1.0), UNIT) == 42
        with stablekl.harden():
            assert kl_divergence(Theirs(0.0, 1.0), UNIT) == 42
        assert stablekl.kl_divergence(UNIT, Theirs(0.0, 1.0)) == 0
    finally:
        del _KL_REGISTRY[Theirs, Normal]
        torch.distributions.kl._KL_MEMOIZE.clear()


def subclasses():
    """Of torch's classes and ours, as in somebody's own code."""
    for family in (*TORCHS, stablekl.Normal, stablekl.MultivariateNormal, stablekl.LowRankMultivariateNormal):
        yield family
        yield type("Sub", (family,), {})


def test_dispatch_is_never_ambiguous():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in subclasses():
            for q in subclasses():
                rule = torch.distributions.kl._dispatch_kl(p, q)
                torch.distributions.kl._KL_MEMOIZE.clear()
                ours = any(c.__module__.startswith("stablekl.") for c in (*p.__mro__, *q.__mro__))
                if ours:
                    assert rule.__module__.startswith("stablekl.")
                assert stablekl.registry.rule_for(p, q).__module__.startswith("stablekl.")


def test_a_pair_nobody_knows():
    p, q = Normal(0.0, 1.0), torch.distributions.VonMises(0.0, 1.0)
    for dispatch in (stablekl.kl_divergence, kl_divergence):
        with pytest.raises(NotImplementedError):
            dispatch(p, q)
    with pytest.raises(NotImplementedError, match=r"Normal against VonMises.*register_kl"):
        stablekl.kl_divergence(p, q)
