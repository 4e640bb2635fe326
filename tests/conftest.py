"""Options of the test suite: ``pytest --dtype float64 --device cuda``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every run; no deadline, since machines that run tests are busy.
settings.register_profile("stablekl", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("stablekl")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options."""
    names = ["float16", "bfloat16", "float32", "float64"]
    parser.addoption("--dtype", choices=names, default="float32", help="torch's default dtype")
    parser.addoption("--device", default="cpu", help="torch's default device")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among xdist's workers: two pools of all threads each are slower than one."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype that ``--dtype`` names."""
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that ``--device`` names."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Apply both options to each test, and leave no default behind that a test has changed."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.config.getoption("--dtype")))
    device = request.config.getoption("--device")
    if device != "cpu":  # the mode intercepts every call: none at all on a CPU
        torch.set_default_device(device)
    yield
    torch.set_default_dtype(old)
    if device != "cpu":
        torch.set_default_device(None)


@pytest.fixture(autouse=True)
def validation():
    """Constructors check their arguments in every test: a process's first torch.compile turns that off for good."""
    torch.distributions.Distribution.set_default_validate_args(True)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the precision suite keeps its records during a test: nothing is there yet."""
    monkeypatch.setattr("stablekl.precision.ratchet.DATA", tmp_path / "data")
    return tmp_path / "data"
