"""What lies beyond the ends of the part of an axis on which two densities can be evaluated, by extrapolation.

The axis is that of `axis`, on which powers of x are exponentials: logarithms of densities go on as straight lines. The
error is that of the slopes, whose digits are few where the line is nearly level; where they are noise it is inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...special import expm1mx

__all__ = ["SMALL", "Tail", "Values", "tail_beyond"]

SMALL = 0.35  # |u| up to which e^-u - 1 + u is taken as one
_EPS = 2.0**-52
_NOTHING = 1e-20  # density of a tail of which nothing else needs to be known


class Values(NamedTuple):
    """Everything at points, as densities of y."""

    integrand: Tensor
    shift: Tensor
    log_p: Tensor
    u: Tensor
    mass_p: Tensor
    mass_q: Tensor


class Tail(NamedTuple):
    """What lies beyond an end: the integral, its error (inf: unknown), where it diverges, and masses of p and q."""

    value: Tensor
    error: Tensor
    infinite: Tensor
    mass_p: Tensor
    mass_q: Tensor


def tail_beyond(values: Values, noise: tuple[Tensor, Tensor], alike: Tensor, step: Tensor) -> Tail:
    """By extrapolation from the values at 0, 1 and 2 steps before the end, and the noise of the logarithms there.

    Two more points, an eighth of the axis away, tell a u that is a power of x from a slower one.
    """
    log_p, u = values.log_p, values.u
    alive = log_p[0] > -800
    fall = torch.where(alive, (log_p[1] - log_p[0]) / step, 1.0)
    rise = torch.where(alive, (u[0] - u[1]) / step, 0.0)
    moved = 0.5 * _EPS * values.shift[:3]
    noise_p, noise_q = (
        torch.where(alive, n[:3] + moved * (1 + slope.abs()), 0.0)
        for n, slope in zip(noise, (fall, fall + rise), strict=True)
    )
    noise_u = noise_p + noise_q
    fall_noise, rise_noise = ((x[0] + x[1]) / step for x in (noise_p, noise_u))
    bend = (u[0] - 2 * u[1] + u[2]).abs() + (log_p[0] - 2 * log_p[1] + log_p[2]).abs()
    bend = torch.where(alive, bend / step, 0.0)
    straight = bend < 1e-3 * (rise.abs() + fall.abs())
    noisy = bend <= 8 * noise_u.sum(0) / step
    mass, level = torch.where(alive, torch.exp(log_p[0]), 0.0), torch.where(alive, u[0], 0.0)
    # the integral of e^(-fall t)(level + rise t)
    linear = mass * (level + rise / fall) / fall
    q_fall = fall + rise
    small = level.abs() < SMALL
    near = torch.where(small, level, 0.0)
    both = expm1mx(-near) / fall + rise * rise / (fall * fall * q_fall) - rise * torch.expm1(-near) / (fall * q_fall)
    log_q = torch.where(alive, log_p[0] - level, -torch.inf)
    far = mass * ((level - 1 + rise / fall) / fall) + torch.exp(log_q) / q_fall
    positive = torch.where(q_fall > 0, torch.where(small, mass * both, far), linear)
    # u a power of x: p u is exponential, as it has been for long
    log_u = torch.log(u.abs())
    growth = [(log_u[i] - log_u[i + 1]) / step for i in (0, 3)]
    decay = torch.where(alive, fall - growth[0], 1.0)
    powerful = (u[0] > 0) & (growth[1] > 0) & (growth[0] > 0.95 * growth[1])
    steeper = fall > 1.05 * (log_p[4] - log_p[3]) / step
    power = mass * level / decay
    value = torch.where(straight, torch.where(alike, positive, linear), power)
    loose = noise_u[0] + (rise_noise + (rise.abs() * 2 + level.abs() * fall) * (fall_noise / fall)) / fall
    # and a bend too small to be seen counts over the whole length of 1/fall
    unseen_p, unseen_u = (x.sum(0) / (step * fall) / (step * fall) for x in (noise_p, noise_u))
    loose = loose + unseen_u + (level.abs() + rise.abs() / fall) * unseen_p
    error = torch.where(
        straight, (1e-9 + 10 * bend / (fall.abs() + rise.abs())) * value.abs() + loose * mass / fall, 0.3 * value.abs()
    )
    infinite = alive & ~straight & powerful & (decay <= 1e-6) & ~noisy & ~steeper
    # slopes that are noise say nothing, nor do those of other curves, but where nearly nothing is left to be said
    curved = ~straight & (noisy | ~powerful | (decay <= 1e-6))
    unknown = alive & ~infinite & ((fall <= 8 * fall_noise) | curved | ~value.isfinite())
    error = torch.where(unknown, torch.where(mass * (1 + level.abs()) > _NOTHING, torch.inf, _NOTHING), error)
    nothing = ~alive | infinite | unknown
    mass_p = torch.where(nothing, 0.0, mass / torch.where(fall > 0, fall, 1.0))
    # q's where p has none is not in the value, which then has to do without
    mass_q = torch.where(nothing | ~(q_fall > 0), 0.0, torch.exp(log_q) / torch.where(q_fall > 0, q_fall, 1.0))
    return Tail(torch.where(nothing, 0.0, value), torch.where(~alive | infinite, 0.0, error), infinite, mass_p, mass_q)
