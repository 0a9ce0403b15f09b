"""The optional package onnx, asked for where a graph is built."""

from __future__ import annotations

from types import ModuleType

from ...errors import BadInput


class MissingPackage(BadInput):
    """An optional package that this command needs is not installed."""


def onnx_package() -> ModuleType:
    """The module ``onnx`` with its helpers; :class:`MissingPackage` says how to install it."""
    try:
        import onnx
        import onnx.helper
    except ImportError as error:
        raise MissingPackage(
            f"building needs the package onnx ({error}): install it with pip install 'avl-edge[export]'"
        ) from None
    return onnx
