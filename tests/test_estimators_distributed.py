"""Several processes give what one gives, bit for bit; and an error in one of them is an error in all, not a wait."""

from __future__ import annotations

import datetime
import sys
import textwrap

import torch
import torch.distributed as dist

import stablekl

from .processes import START, outputs

IMPORTS = """
from torch.distributions import *
from stablekl.estimators import kl_from_log_ratio, kl_monte_carlo
"""


def processes(body, size, path):
    """Standard output of each of the processes that run ``body``."""
    return outputs(IMPORTS + textwrap.dedent(body), size, path)


def alone(body, capsys, monkeypatch):
    """Standard output of ``body`` in this process."""
    monkeypatch.setattr(sys, "argv", ["", "0", "1", ""])
    monkeypatch.setattr("stablekl.estimators.monte_carlo.CHUNK", 300)
    threads = torch.get_num_threads()
    try:
        exec(START + IMPORTS + textwrap.dedent(body), {})
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


DRAWN = """
import stablekl.estimators.monte_carlo as module
module.CHUNK = 300
F64 = torch.float64
p, q = Normal(torch.zeros(3, dtype=F64), 1.0), Normal(torch.tensor([0.5, 1.0, 2.0], dtype=F64), 1.5)
m = stablekl.GaussianMixture(
    probs=torch.tensor([0.2, 0.8], dtype=F64), loc=torch.tensor([[-3.0, 0.0], [1.0, 2.0]], dtype=F64),
    scale_diag=torch.ones(2, 2, dtype=F64))
n = stablekl.MultivariateNormal(torch.zeros(2, dtype=F64), scale_diag=torch.full((2,), 2.0, dtype=F64))
for pair in ((p, q), (StudentT(torch.tensor(5.0)), Laplace(0.0, 1.0)), (m, n)):
    for kwargs in (
        dict(), dict(estimator="k3", stratified=False), dict(points="antithetic"), dict(points="sobol"),
        dict(control_variates=True), dict(target_standard_error=0.02), dict(distributed=False),
        dict(points="sobol", target_standard_error=0.01, num_replicates=4),
    ):
        if isinstance(pair[0], StudentT) and "points" in kwargs:
            continue
        # each rank has a state of its own; rank 0's counts
        torch.manual_seed(0 if kwargs.get("distributed") is False else rank)
        e = kl_monte_carlo(*pair, 1234, **kwargs)
        dof = torch.as_tensor(e.degrees_of_freedom)
        print(e.value.tolist(), e.standard_error.tolist(), e.num_samples, dof.tolist())
"""


def test_any_number_of_processes_gives_the_same_bits(tmp_path, capsys, monkeypatch):
    one = alone(DRAWN, capsys, monkeypatch)
    assert one.count("\n") == 21
    for size in (2, 3):
        assert processes(DRAWN, size, tmp_path) == [one] * size


SHARDS = """
torch.manual_seed(0)
whole = torch.randn(1000, 2, dtype=torch.float64) + 1
mine = whole if size == 1 else whole.split([700, 300, 0])[rank] if size == 3 else whole.split([1, 999])[rank]
e = kl_from_log_ratio(mine, "k3")
print(*(f"{v:.10f}" for v in [*e.value, *e.standard_error]), e.num_samples)
own = kl_from_log_ratio(whole[rank:], distributed=False)
assert own.num_samples == 1000 - rank
"""


def test_shards_of_log_ratios_are_merged(tmp_path, capsys, monkeypatch):
    one = alone(SHARDS, capsys, monkeypatch)
    assert one.endswith("1000\n")
    for size in (2, 3):
        assert processes(SHARDS, size, tmp_path) == [one] * size


ERRORS = """
def message(f):
    try:
        f()
    except ValueError as error:
        print(str(error)[:60])

ratio = torch.ones(10)
if rank == 1:
    ratio[3] = torch.nan
message(lambda: kl_from_log_ratio(ratio))
message(lambda: kl_from_log_ratio(torch.ones(10) if rank == 0 else torch.ones(10, 3)))
message(lambda: kl_from_log_ratio(torch.arange(50.0) - 100))
message(lambda: kl_monte_carlo(Normal(0.0, 1.0), Normal(0.0, 1.0), 100 if rank == 0 else 1))
message(lambda: kl_monte_carlo(Normal(0.0, 1.0), Normal(0.0, 1.0), 100 + rank))

class Broken(Laplace):
    def log_prob(self, value):
        if rank == 1:
            raise RuntimeError("out of memory")
        return super().log_prob(value)

try:
    kl_monte_carlo(Broken(0.0, 1.0), Normal(0.0, 1.0), 2**21)
except RuntimeError as error:
    print(error)
assert kl_monte_carlo(Normal(0.0, 1.0), Normal(1.0, 1.0)).num_samples == 10_000  # and they go on together
"""


def test_an_error_in_one_process_is_raised_in_all(tmp_path):
    outs = processes(ERRORS, 2, tmp_path)
    assert outs[0] == outs[1]
    nan, shape, sign, few, differ, memory = outs[0].splitlines()
    assert nan.startswith("rank 1 of 2: log_ratio[3] is NaN")
    assert shape.startswith("the processes of torch.distributed share")
    assert sign.startswith("the log-ratios average -75.5")
    assert few.startswith("rank 1 of 2: a standard error needs at least 2 samples")
    assert differ.startswith("the processes of torch.distributed share")
    assert memory == "rank 1 of 2: out of memory"


def test_a_group_of_one(tmp_path):
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=limit)
    try:
        torch.manual_seed(0)
        p, q = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(1.0, 1.0)
        together = stablekl.estimators.kl_monte_carlo(p, q)
        torch.manual_seed(0)
        assert float(together.value) == float(stablekl.estimators.kl_monte_carlo(p, q, distributed=False).value)
    finally:
        dist.destroy_process_group()
