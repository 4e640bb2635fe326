"""Runs a script in several processes that share a gloo group."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

import stablekl

START = """
import datetime, sys, torch, torch.distributed as dist
import stablekl
torch.set_num_threads(1)
rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if size > 1:
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size, timeout=limit)
"""
END = """
if size > 1:
    dist.destroy_process_group()
"""


def outputs(body: str, size: int, path: Path) -> list[str]:
    """Standard output of each of the processes that run ``body``, which knows its ``rank`` and the ``size``."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no torch.distributed with gloo")
    path = path / f"of{size}"
    path.mkdir()
    script = path / "script.py"
    script.write_text(START + textwrap.dedent(body) + END)
    root = str(Path(stablekl.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        done = [p.communicate(timeout=90) for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0] * size, "\n".join(error for _, error in done)
    return [out for out, _ in done]
