"""KL rules between families on the line: every pair that torch registers, and some that it lacks."""

from __future__ import annotations

from . import (
    discrete,
    half_normal,
    infinite,
    inverse_gamma,
    log_normal,
    shapes_to_laplace,
    to_gamma,
    to_gumbel,
    to_interval,
    to_laplace,
    to_normal,
    weibull,
)

__all__ = [
    "discrete",
    "half_normal",
    "infinite",
    "inverse_gamma",
    "log_normal",
    "shapes_to_laplace",
    "to_gamma",
    "to_gumbel",
    "to_interval",
    "to_laplace",
    "to_normal",
    "weibull",
]
