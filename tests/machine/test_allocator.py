"""What is freed goes back to the system, at once and every time, so that a peak is the peak of live tensors."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
from pathlib import Path
from avl_edge.machine import allocator

os.environ["LRU_CACHE_CAPACITY"] = "5"
allocator.bound()
assert os.environ["LRU_CACHE_CAPACITY"] == "5", "the user's word stays"
assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"].isdecimal()

import torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.ones(1000).sum()
start = resident()
for megabytes in (30, 20, 10, 25, 5):
    block, small = torch.ones(megabytes * 250_000), torch.ones(1000)
    assert resident() - start > 0.9 * megabytes * 1e6
    del block
    assert resident() - start < 2e6, "the heap kept it"
"""


def test_freed_tensors_go_back() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
