"""Losses that train: unreduced functions, one number for each row, and modules with torch.nn's ``reduction``."""

from .categorical import categorical_kl, grid_kl_loss
from .gaussian import gaussian_kl_loss, gaussian_log_ratio_loss
from .mixture import MixtureDiagnostics, mixture_diagnostics, mixture_nll_loss
from .modules import CategoricalKLLoss, GaussianKLLoss, GridKLLoss, KLPenalty, MixtureNLLLoss
from .penalty import kl_penalty
from .target import Grid, elbo_loss, forward_kl_loss, reverse_kl_loss

__all__ = [
    "CategoricalKLLoss",
    "GaussianKLLoss",
    "Grid",
    "GridKLLoss",
    "KLPenalty",
    "MixtureDiagnostics",
    "MixtureNLLLoss",
    "categorical_kl",
    "elbo_loss",
    "forward_kl_loss",
    "gaussian_kl_loss",
    "gaussian_log_ratio_loss",
    "grid_kl_loss",
    "kl_penalty",
    "mixture_diagnostics",
    "mixture_nll_loss",
    "reverse_kl_loss",
]
