"""Which format a checkpoint's quantised layers are in, by its ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import BadModel, quoted
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .gptq import Gptq
from .stored import CONVERT, QuantFormat

_METHODS = ("compressed-tensors", "awq", "gptq", "auto-round")
_COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")

_AUTO_ROUND: dict[str, QuantFormat] = {
    "auto_round:auto_gptq": Gptq(zero_offset=1),
    "auto_round:gptqmodel": Gptq(zero_offset=0),
    "auto_round": Gptq(zero_offset=0),
    "auto_round:auto_awq": Awq(),
}


def quant_format(config: Mapping[str, Any]) -> QuantFormat | None:
    """The format that config.json names, None where its weights are plain; :class:`BadModel` for one that is not
    served. The method decides, never the checkpoint's name; what a layer's tensors say themselves is read there."""
    section = config.get("quantization_config") or config.get("compression_config")
    if section is None:
        return None
    if not isinstance(section, dict):
        raise BadModel(f"config.json: quantization_config must be an object, not {quoted(section)}")
    method = section.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(section)
    if method == "awq":
        return _awq(section)
    if method == "gptq":
        return _gptq(section)
    if method in ("auto-round", "intel/auto-round"):
        return _auto_round(section)
    raise BadModel(f"config.json: quant_method {quoted(method)} is none of {', '.join(_METHODS)}{CONVERT}")


def _compressed_tensors(section: Mapping[str, Any]) -> QuantFormat:
    groups = _object(section, "config_groups").values()
    for name in (section.get("format"), *(group.get("format") for group in groups if isinstance(group, dict))):
        if name is not None and name not in _COMPRESSED:
            raise BadModel(f"config.json: weights are stored as {quoted(name)}, which is not served{CONVERT}")
    sparsity = _object(section, "sparsity_config").get("format") or "dense"
    if sparsity != "dense":
        raise BadModel(f"config.json: weights are sparse ({quoted(sparsity)}), which is not served{CONVERT}")
    if _object(section, "transform_config"):
        raise BadModel(f"config.json: transform_config asks for rotated activations, which are not served{CONVERT}")
    return CompressedTensors()


def _object(section: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = section.get(name)
    return value if isinstance(value, dict) else {}


def _awq(section: Mapping[str, Any]) -> QuantFormat:
    version = str(section.get("version") or "gemm").lower()
    if version != "gemm":
        raise BadModel(f"config.json: AWQ's layout {quoted(version)} is not served, only gemm{CONVERT}")
    return Awq()


def _gptq(section: Mapping[str, Any]) -> QuantFormat:
    version = section.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise BadModel(f"config.json: GPTQ's layout {quoted(version)} is not served, only gptq and gptq_v2{CONVERT}")
    return Gptq(zero_offset=1 if version == "gptq" else 0)


def _auto_round(section: Mapping[str, Any]) -> QuantFormat:
    """auto-round writes layouts of others; ``packing_format`` says which."""
    packing = section.get("packing_format") or "auto_round:auto_gptq"
    if not isinstance(packing, str) or packing not in _AUTO_ROUND:
        served = ", ".join(_AUTO_ROUND)
        raise BadModel(f"config.json: packing_format {quoted(packing)} is not served, only {served}{CONVERT}")
    return _AUTO_ROUND[packing]
