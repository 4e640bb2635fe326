"""What is measured: one file per kind of rule, and the catalogue of all of them."""

from __future__ import annotations

import functools

from ..subject import Subject
from . import family_mixture, gaussian, integrated, mixture, scalar, special, tails, trials, vector

__all__ = ["catalogue"]


@functools.cache
def catalogue() -> dict[str, Subject]:
    """Every subject by its name, those of stablekl's own rules first."""
    kinds = (scalar, trials, tails, integrated, vector, gaussian, mixture, family_mixture, special)
    found = [subject for kind in kinds for subject in kind.subjects()]
    found.sort(key=lambda s: "stablekl" not in s.rules)
    return {subject.name: subject for subject in found}
