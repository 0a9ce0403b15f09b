"""The native libraries and the files that lie beside the package; all else about it is in pyproject.toml.

The CPU's decode step with its attention kernel, and the row books, are plain shared libraries with a C interface, built
as extensions so that they land in the package. They are optional: without a compiler the install succeeds,
`avl_edge.attention.native` says at its first use what is missing, and `avl_edge.kv.books` does its work in numpy. The
GPU's kernels are compiled on the device by `avl_edge.attention.cuda`, so their sources are copied into the package, as
device profiles and build recipes are.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

RESOURCES = ("engines/*.yaml", "plugins/cuda/*.cu", "plugins/cuda/*.cuh", "profiles/*.yaml")
"""What `avl_edge.resources` finds: in the repository, or copied into the package."""


class BuildWithResources(build_py):
    """Also puts the resources into the package, at the same paths; an editable install finds them in the repository."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in self._resources():
                target = Path(self.build_lib) / "avl_edge" / source
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *map(str, self._resources())]

    def _resources(self) -> list[Path]:
        return [path for pattern in RESOURCES for path in sorted(Path().glob(pattern))]


setup(
    cmdclass={"build_py": BuildWithResources},
    ext_modules=[
        Extension(
            "avl_edge.attention._core_attention",
            sources=["plugins/cpu/core_attention.cpp", "plugins/cpu/decoder.cpp"],
            depends=sorted(map(str, Path("plugins/cpu").glob("*.h"))),
            language="c++",
            # No -march: the source chooses the instruction set when it runs, so that one wheel serves every processor.
            # No -fopenmp: linked with no OpenMP runtime, the library binds to the one that torch has loaded.
            # -g0: some builds of Python add -g, and debug information would be most of the file.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        ),
        Extension(
            "avl_edge.kv.books._books",
            sources=["plugins/cpu/books.cpp"],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-g0"],
            optional=True,
        ),
    ],
)
