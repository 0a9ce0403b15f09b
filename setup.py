"""The native attention kernel; everything else about the package is in pyproject.toml.

The kernel is a plain shared library with a C interface, built as an extension so that it lands in the package. It is
optional: without a compiler the install succeeds, and `avl_edge.native` says at its first use what is missing.
"""

from __future__ import annotations

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "avl_edge._core_attention",
            sources=["plugins/cpu/core_attention.cpp"],
            language="c++",
            # No -march: the source chooses the instruction set when it runs, so that one wheel serves every processor.
            # No -fopenmp: linked with no OpenMP runtime, the library binds to the one that torch has loaded.
            # -g0: some builds of Python add -g, and debug information would be most of the file.
            extra_compile_args=["-std=c++17", "-O3", "-g0"],
            optional=True,
        )
    ]
)
