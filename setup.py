"""The attention kernels; everything else about the package is in pyproject.toml.

The CPU's is a plain shared library with a C interface, built as an extension so that it lands in the package. It is
optional: without a compiler the install succeeds, and `avl_edge.attention.native` says at its first use what is
missing. The GPU's is compiled on the device by `avl_edge.attention.cuda`, so its sources are copied into the package.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

CUDA_SOURCES = Path("plugins/cuda")


class BuildWithCuda(build_py):
    """Also puts the CUDA sources beside the module that compiles them; an editable install finds them in plugins/."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "avl_edge" / "attention" / "cuda"
            self.mkpath(str(folder))
            for source in (*CUDA_SOURCES.glob("*.cu"), *CUDA_SOURCES.glob("*.cuh")):
                self.copy_file(str(source), str(folder / source.name))


setup(
    cmdclass={"build_py": BuildWithCuda},
    ext_modules=[
        Extension(
            "avl_edge.attention._core_attention",
            sources=["plugins/cpu/core_attention.cpp"],
            depends=[f"plugins/cpu/{name}.h" for name in ("items", "rows", "step", "vectors")],
            language="c++",
            # No -march: the source chooses the instruction set when it runs, so that one wheel serves every processor.
            # No -fopenmp: linked with no OpenMP runtime, the library binds to the one that torch has loaded.
            # -g0: some builds of Python add -g, and debug information would be most of the file.
            extra_compile_args=["-std=c++17", "-O3", "-g0"],
            optional=True,
        )
    ],
)
