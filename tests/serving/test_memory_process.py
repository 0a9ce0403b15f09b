"""A process that was bounded as a whole stays within that, whatever is asked of it; and it would not if any one entry
of its ledger were forgotten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import ROOT
from tests.equipment.checkpoints import CheckpointSpec, make_checkpoint
from tests.equipment.processes import PEAK_MEMORY

SPEC = CheckpointSpec(
    "llama", heads=8, kv_heads=4, head_dim=64, layers=2, image_size=336, max_position_embeddings=16384, seed=21
)
"""A full context's activations are 400 MB; so much are the pixels or the features of 300 pictures, too."""
UNUSED_BYTES = 420 * 2**20
"""Of weights that no layer takes: they are mapped and read like others, and cost no computation."""

PROGRAM = """
import gc, io, sys
from pathlib import Path
import numpy as np
from PIL import Image
from avl_edge import BadInput, DoesNotFit, Formats, Options, Runtime
from avl_edge.backends.cpu.target import Cpu
from avl_edge.machine import allocator
from avl_edge.planning.process_memory import Workspace
from avl_edge.planning.request_planner import RequestPlanner
from avl_edge.serving.picture_reader import PictureReader

directory, huge, forgotten, pictures = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if forgotten == "weights":
    Cpu.weight_bytes = lambda *_: 0
if forgotten == "activations":
    RequestPlanner.workspace = lambda *_: Workspace()
if forgotten == "decoding":
    PictureReader.max_pixels = 64_000_000
limit = allocator.resident_bytes() + 1376 * 10**6
runtime = Runtime.load(directory, max_memory=limit)
for name in {"features", "pixels"} & {forgotten}:
    runtime.debug.ledger[name].limit = None

def picture(seed, side=64):
    data = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(data).save(file, "PNG")
    return file.getvalue()

kept, refused = [], 0
def ask(images, words, options):
    global refused
    try:
        kept.append(runtime.generate(images, words, options))
    except DoesNotFit:
        refused += 1

sessions = []
while True:  # rows fill the pool
    session = runtime.open_images([picture(len(sessions))])
    try:
        session.load()
    except DoesNotFit:
        session.close()
        break
    sessions.append(session)
asked = [session.ask("What?", Options(max_new_tokens=8, temperature=1.0)) for session in sessions[:2]]
for generation in asked:
    generation.result()
for session in sessions:
    session.close()
gc.collect()
mixed = Options("avl", formats=Formats("exact", "exact", "int8"), max_new_tokens=8)
ask([picture(90), picture(91)], "What is shown? " * 30, mixed)
kept[-1].result()
for seed in range(100, 100 + pictures):  # features of more pictures than are kept
    ask([picture(seed)], "What?", Options("fastv", {"layer": 1, "drop": 100}, max_new_tokens=1))
    kept[-1].result()
largest = picture(92, min(3000, int(runtime.max_pixels**0.5)))
long = Options(method="full", max_new_tokens=8, temperature=0.8, top_p=0.9)
ask([], "boat " * 1000, long)  # one after the other, while others come with pictures
ask([], "boat " * 5400, long)
try:
    runtime.prepare([huge], "What?")
    refused += forgotten == "decoding"
except BadInput:
    refused += 1
ask([largest], "What?", mixed)
for seed in range(200, 500):  # a client that fills the queue with pictures
    ask([picture(seed)], "What?", Options(max_new_tokens=1))
    if forgotten != "pixels" and refused > 3:
        break
for generation in kept:
    generation.result()
stats = runtime.memory()
held = sum(entry.peak for entry in stats.entries.values())
assert len(sessions) >= 5, len(sessions)
assert refused >= 2 or forgotten == "pixels", refused
assert held <= limit or forgotten, held
runtime.close()
peak = 1024 * peak_memory()
print("within" if peak <= limit else "beyond", peak - limit, len(sessions), len(kept), refused, held - limit)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide") / "model")


def make_model(directory: Path) -> Path:
    make_checkpoint(directory, SPEC)
    weights = load_file(directory / "model.safetensors")
    weights["unused"] = torch.zeros(UNUSED_BYTES, dtype=torch.uint8)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 64 megapixels in a file of some 100 kB, of the kind that takes the most copies: transparent, and to
    be turned."""
    path = tmp_path_factory.mktemp("huge") / "huge.png"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGBA", (8000, 8000), (10, 20, 30, 128)).save(path, exif=turned)
    return path


def _run(directory: Path, huge: Path, forgotten: str, pictures: int) -> str:
    command = [sys.executable, "-c", PEAK_MEMORY + PROGRAM, str(directory), str(huge), forgotten, str(pictures)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_bounded_process_stays_within_its_bound(directory: Path, huge: Path) -> None:
    """Prompts, pictures, image sessions, sampled answers, rows that change their formats, a full pool, a full queue."""
    said = _run(directory, huge, "", 12)
    assert said.startswith("within"), said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("forgotten", ["weights", "activations", "features", "pixels", "decoding"])
def test_it_would_not_if_an_entry_were_forgotten(directory: Path, huge: Path, forgotten: str) -> None:
    said = _run(directory, huge, forgotten, 300 if forgotten == "features" else 4)
    assert said.startswith("beyond"), said
