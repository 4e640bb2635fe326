"""Several processes fit what one fits; and an error in one of them is an error in all, not a wait."""

from __future__ import annotations

import pytest

from .processes import outputs

DATA = """
import warnings
from stablekl.fit import gaussian_mixture
warnings.simplefilter("ignore")
g = torch.Generator().manual_seed(0)
x = 3 * torch.randn(5, 4, generator=g, dtype=torch.float64)[torch.randint(5, (20000,), generator=g)]
x = x + torch.randn(20000, 4, generator=g, dtype=torch.float64)
"""

SAME = (
    DATA
    + """
for how in ("split", "stride"):
    own = x.tensor_split(size)[rank] if how == "split" else x[rank::size]
    for kind in ("full", "tied", "diag", "spherical"):
        shared = gaussian_mixture(own, 5, kind, tol=1e-6)
        alone = gaussian_mixture(x, 5, kind, tol=1e-6, distributed=False)
        a, b = shared.mixture.component_distribution, alone.mixture.component_distribution
        far = max(float((a.mean - b.mean).abs().max()), float((a.covariance_matrix - b.covariance_matrix).abs().max()))
        good = far < 1e-11 and shared.num_iterations == alone.num_iterations
        good &= abs(shared.log_likelihood - alone.log_likelihood) < 1e-8 and shared.num_samples == 20000
        print(good and len(shared.responsibilities) == len(own))
# must differ: a shard alone
lonely = gaussian_mixture(own, 5, tol=1e-6, distributed=False).mixture.component_distribution
print(float((lonely.mean - b.mean).abs().max()) > 1e-4)
# one process without a sample, and batches of different numbers
own = [x] if rank == 0 else []
shared = gaussian_mixture(own, 5, tol=1e-6)
print(abs(shared.log_likelihood - gaussian_mixture(x, 5, tol=1e-6, distributed=False).log_likelihood) < 1e-8)
stepwise = gaussian_mixture(x[: 5000 + 5000 * rank], 5, batch_size=700)
print(bool(stepwise.history.isfinite().all()))
"""
)

ERROR = (
    DATA
    + """
own = x.tensor_split(size)[rank].clone()
if rank == 1:
    own[3, 2] = float("nan")
try:
    gaussian_mixture(own, 5)
except ValueError as e:
    print(e)
try:
    gaussian_mixture(x[:, : 2 + rank], 5)
except ValueError as e:
    print(e)
"""
)


@pytest.mark.parametrize("size", [2, 3])
def test_shards_are_the_whole(size, tmp_path):
    for printed in outputs(SAME, size, tmp_path):
        assert printed.split() == ["True"] * 11


def test_an_error_is_everybodys(tmp_path):
    first, second = (out.splitlines() for out in outputs(ERROR, 2, tmp_path))
    assert first[0] == second[0]
    assert first[0].startswith("rank 1 of 2: column 2 of sample 3 is nan")
    assert first[1] == second[1] == "samples have 2 and 3 columns in different processes"
