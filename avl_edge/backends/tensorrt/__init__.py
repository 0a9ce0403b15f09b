"""TensorRT: the plugin of the decoder's attention (`attention`, `kernels`, `plugin`), engines that hold it (`runner`,
`engines`), and the backend that runs prompts and steps by them (`backend`, `prompt`, `step`, `target`).

Imports without TensorRT, CUDA and a GPU; they are asked for where they are used.
"""

from __future__ import annotations

from ...package.engine import Plugin, find_tensorrt
from .attention import Attention, Sizes
from .kernels import TokenKernels, TokenShape, digest, token_cubin
from .plugin import PluginMissing, make_creator, register, takes_plugins
from .runner import Context, Engine, EngineFailed

__all__ = [
    "Attention",
    "Context",
    "Engine",
    "EngineFailed",
    "PluginMissing",
    "Sizes",
    "TokenKernels",
    "TokenShape",
    "decoder_plugin",
    "digest",
    "make_creator",
    "register",
    "takes_plugins",
    "token_cubin",
]


def decoder_plugin() -> Plugin | None:
    """The plugin for the decoder's engine; None without a TensorRT that takes plugins."""
    trt = find_tensorrt()
    return Plugin(digest(), register) if trt is not None and takes_plugins(trt) else None
