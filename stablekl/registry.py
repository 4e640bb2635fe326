"""The only doorway to torch's registry of KL rules.

Importing stablekl adds rules for pairs that torch lacks and for stablekl's own subclasses; torch's own rules
stay as they are until `harden` replaces them, and come back when it is undone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from types import TracebackType
from typing import TypeVar

from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.kl import _KL_MEMOIZE, _KL_REGISTRY, register_kl

__all__ = ["Hardening", "check_batch_shapes", "harden", "kl_divergence", "register_hardened"]

Rule = Callable[..., Tensor]
RuleT = TypeVar("RuleT", bound=Rule)
Pair = tuple[type[Distribution], type[Distribution]]

# The pairs that torch has a rule for, as far as it knows them now.
_TORCHS = frozenset(pair for pair, rule in _KL_REGISTRY.items() if rule.__module__.startswith("torch."))
# Rules for pairs that torch owns: waiting for harden(), and always used by stablekl.kl_divergence.
_HARDENED: dict[Pair, Rule] = {}
# What harden() took out of torch's registry (None: torch goes by a base class), and who asked for it to stay out.
_REPLACED: dict[Pair, Rule | None] = {}
_ACTIVE: list[Hardening] = []


def check_batch_shapes(p: Distribution, q: Distribution) -> None:
    """ValueError unless the batch shapes of two distributions broadcast."""
    shape_p, shape_q = p.batch_shape, q.batch_shape
    if shape_p == shape_q:
        return
    if any(a not in (b, 1) and b != 1 for a, b in zip(reversed(shape_p), reversed(shape_q), strict=False)):
        raise ValueError(
            f"the batch shapes {tuple(shape_p)} and {tuple(shape_q)} do not broadcast: from the last on, "
            "each pair of sizes must be equal or have a 1 in it. For every p against every q insert a 1 in the "
            "parameters of one of them"
        )


def _of_matching_shapes(rule: Rule) -> Rule:
    """The rule, behind the check that says what is wrong with shapes where torch's broadcasting would not."""

    @functools.wraps(rule)
    def checked(p: Distribution, q: Distribution) -> Tensor:
        check_batch_shapes(p, q)
        return rule(p, q)

    return checked


def _host(family: type[Distribution]) -> type[Distribution]:
    """The torch class that ``family`` is a drop-in for: the first class torch defines among its bases."""
    return next(c for c in family.__mro__ if c.__module__.startswith("torch."))


def register_hardened(
    family_p: type[Distribution], family_q: type[Distribution], *, torch_lacks_it: bool = False
) -> Callable[[RuleT], RuleT]:
    """Register a KL rule for a pair of families, in every mixture of stablekl's and torch's classes.

    Pairs that contain one of our classes, and pairs for which torch has no rule, are registered with torch
    at once. torch picks its own rule silently when only (ours, ours) is registered, and warns of an
    ambiguity when only the mixed pairs are; hence all of them. A pair that torch owns, itself or by its base classes,
    is kept for `harden`. Every rule is registered behind `check_batch_shapes`.

    Args:
        family_p: the family of p, ours or torch's.
        family_q: that of q.
        torch_lacks_it: what torch finds by base classes raises NotImplementedError; our rule is registered at once.
    """

    def decorate(rule: RuleT) -> RuleT:
        registered = _of_matching_shapes(rule)
        host_pair = (_host(family_p), _host(family_q))
        known = any(pair in _TORCHS for pair in product(host_pair[0].__mro__, host_pair[1].__mro__))
        for p in dict.fromkeys((family_p, host_pair[0])):
            for q in dict.fromkeys((family_q, host_pair[1])):
                if (p, q) == host_pair and known and not torch_lacks_it:
                    _HARDENED[p, q] = registered
                else:
                    register_kl(p, q)(registered)
        return rule

    return decorate


def rule_for(type_p: type, type_q: type) -> Rule | None:
    """The rule that `kl_divergence` takes: the most specific p, then q, as in torch; torch.compile can trace it."""
    for p in type_p.__mro__:
        for q in type_q.__mro__:
            rule = _HARDENED.get((p, q)) or _KL_REGISTRY.get((p, q))
            if rule is not None:
                return rule
    return None


def kl_divergence(p: Distribution, q: Distribution) -> Tensor:
    r"""KL divergence :math:`KL(p \| q) = E_p[\log p(x) - \log q(x)]` between two distributions.

    Dispatches on the two types like `torch.distributions.kl_divergence`, with two differences: stablekl's
    rule is taken for every pair that has one, torch's own classes included, whether or not `harden` is
    active; and the dispatch can be traced by ``torch.compile(fullgraph=True)`` on the first call.

    Args:
        p: the distribution the expectation is taken under.
        q: the distribution it is compared with. Batch shapes broadcast.

    Returns:
        The divergence in nats, of the broadcast batch shape.

    Raises:
        NotImplementedError: no rule is known for the pair.
        ValueError: the batch shapes do not broadcast.

    Example:
        >>> import torch, stablekl
        >>> p = torch.distributions.Normal(0.0, 1e-25)
        >>> print(f"{stablekl.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)):.3f}")
        57.065
    """
    rule = rule_for(type(p), type(q))
    if rule is None:
        raise NotImplementedError(
            f"no KL rule for {type(p).__name__} against {type(q).__name__}: torch and stablekl have none. "
            "Register one with torch.distributions.register_kl, or estimate it from samples."
        )
    return rule(p, q)


class Hardening:
    """A period during which stablekl's rules stand in for torch's own; ends with `restore`."""

    def __init__(self) -> None:
        """Begin the period at once."""
        for pair, rule in _HARDENED.items():
            current = _KL_REGISTRY.get(pair)
            if current is not rule:
                _REPLACED[pair] = current
                _KL_REGISTRY[pair] = rule
        _KL_MEMOIZE.clear()
        _ACTIVE.append(self)

    def restore(self) -> None:
        """Put torch's own rules back, once every `Hardening` has ended. Calling it again does nothing.

        A rule that somebody else registered in the meantime is left alone.
        """
        if self not in _ACTIVE:
            return
        _ACTIVE.remove(self)
        if _ACTIVE:
            return
        for pair, before in _REPLACED.items():
            if _KL_REGISTRY.get(pair) is not _HARDENED[pair]:
                continue
            if before is None:
                del _KL_REGISTRY[pair]
            else:
                _KL_REGISTRY[pair] = before
        _REPLACED.clear()
        _KL_MEMOIZE.clear()

    def __enter__(self) -> Hardening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def harden() -> Hardening:
    """Replace torch's own KL rules by stablekl's, for code that builds torch's own classes.

    Works as a call, undone by ``.restore()`` on what it returns, and as a context manager. Process-wide, as
    torch's registry is.

    Example:
        >>> import torch, stablekl
        >>> p, q = torch.distributions.Normal(0.0, 1e-25), torch.distributions.Normal(0.0, 1.0)
        >>> torch.distributions.kl_divergence(p, q)
        tensor(inf)
        >>> with stablekl.harden():
        ...     print(f"{torch.distributions.kl_divergence(p, q):.3f}")
        57.065
    """
    return Hardening()
