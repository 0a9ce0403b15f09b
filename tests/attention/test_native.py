"""The native library: found, loaded onto torch's own threads, or missed with one warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from avl_edge.attention import native
from avl_edge.attention.kernels import attend, attend_reference
from tests import ROOT
from tests.equipment.decode_attention import choose, needs_native, offsets_of, pool
from tests.equipment.processes import run_python


@pytest.fixture
def _forget_library() -> Iterator[None]:
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("_forget_library")
@pytest.mark.parametrize("broken", [False, True])
def test_without_the_library_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    if broken:
        (tmp_path / f"_core_attention{native.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    keys, values = pool(30, 2, 64, torch.float32, "apart")
    arguments = torch.randn(1, 4, 64), keys, values, choose(30, [9]), offsets_of([9]), 0.125
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not native.available()
        results = [attend(*arguments)[0] for _ in range(3)]
    assert len(caught) == 1
    assert caught[0].category is RuntimeWarning
    assert "native attention kernel" in str(caught[0].message)
    assert "install g++ or clang" in str(caught[0].message)
    for result in results:
        assert torch.equal(result, attend_reference(*arguments)[0])


@pytest.mark.usefixtures("_forget_library")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build an older library with")
def test_a_library_of_an_older_build_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.c").write_text("int avl_attend(const char* call, const char* parts) { return 0; }")
    built = tmp_path / f"_core_attention{native.EXTENSION_SUFFIXES[0]}"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(tmp_path / "old.c")], check=True)
    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    with pytest.warns(RuntimeWarning, match="another version of the source.*install g"):
        assert not native.available()


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernel() -> None:
    """The kernel runs on torch's own team: as many threads as torch is set to use, and no more with both at work."""
    run_python(
        """
        import os, re
        import torch
        from avl_edge.attention.kernels import attend
        keys = torch.randn(2000, 4, 128)
        rows, offsets = torch.arange(2000, dtype=torch.int32), torch.tensor([0, 2000], dtype=torch.int32)
        def step():
            attend(torch.randn(1, 4, 128), keys, keys, rows, offsets, 0.1)
        def threads():
            return len(os.listdir("/proc/self/task"))
        torch.set_num_threads(1)
        step()
        alone = threads()
        torch.set_num_threads(3)
        step()
        assert threads() == alone + 2, (alone, threads())
        torch.randn(1 << 22).exp_()
        step()
        assert threads() == alone + 2, (alone, threads())
        maps = open("/proc/self/maps").read()
        runtimes = set(re.findall(r"/\\S*lib(?:gomp|omp|iomp5)\\S*", maps))
        assert len(runtimes) == 1, runtimes
        """
    )


MAPS = """\
7f10a0000000-7f10a0020000 r-xp 00000000 08:01 11 /usr/lib/aarch64-linux-gnu/libgomp.so.1.0.0
7f10b0000000-7f10b0020000 r--p 00000000 08:01 12 /home/a b/site-packages/torch/lib/libtorch_cpu.so
7f10c0000000-7f10c0020000 r-xp 00000000 08:01 13 {torchs}
7f10d0000000-7f10d0020000 r-xp 00000000 08:01 14 /opt/openmpi/lib/libompitrace.so.40
7f10e0000000-7f10e0020000 rw-p 00000000 00:00 0
"""


@pytest.mark.parametrize(
    "torchs",
    [
        "/home/a b/site-packages/torch.libs/libgomp-f3febf51.so.1.0.0",
        "/home/a b/site-packages/torch/lib/libgomp.so.1",
        "/home/a b/site-packages/torch/lib/libomp.so",
    ],
)
def test_the_openmp_runtime_is_torchs(torchs: str) -> None:
    assert native.openmp_runtime(MAPS.format(torchs=torchs)) == torchs
    system = MAPS.format(torchs="/usr/lib/libm.so.6")
    assert native.openmp_runtime(system) == "/usr/lib/aarch64-linux-gnu/libgomp.so.1.0.0"
    assert native.openmp_runtime("") is None


@needs_native
@pytest.mark.usefixtures("_forget_library")
def test_a_mapped_file_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    maps.write_bytes(b"7f10a0000000-7f10a0020000 r--p 00000000 08:01 11 /home/caf\xe9/weights.bin\n")
    monkeypatch.setattr(native, "MAPS", maps)
    assert native.available()


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_openmp_runtime_that_torch_keeps_to_itself() -> None:
    """As builds of torch for Arm do: the library is loaded all the same."""
    run_python(
        f"""
        import ctypes, importlib.util, sys, types
        sys.modules["torch"] = types.ModuleType("torch")
        ctypes.CDLL({native.openmp_runtime(Path("/proc/self/maps").read_text())!r})
        spec = importlib.util.spec_from_file_location("native", {native.__file__!r})
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        library = next(native.DIRECTORY.glob("_core_attention*.so"))
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            assert "GOMP_parallel" in str(error)
        else:
            raise SystemExit("the runtime was not kept apart")
        assert native.available()
        """
    )


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
def test_install_survives_a_missing_compiler(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CC": "/nonexistent", "CXX": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
