"""A checkpoint's files anew: its decoder packed, one layer in memory at a time, and all else as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...config import Progress, require
from ...files import read_json
from ...model.checkpoint import DECODER_MATRIX, Weights, is_quantized
from ...model.checkpoint_files import Mapped, map_tensors
from ...model.families import read_spec
from ...model.spec import ModelSpec
from ...model.weight_format import WeightFormats
from ...model.weights import pack
from ...model.weights.compressed_tensors import quantization_config, stored_parts
from ...request import Prompt
from .calibration import Calibration
from .scaling import Scaling, Site, layer_sites
from .staging import require_new, staged

_PLAIN_BYTES = 1 << 29
"""About how many bytes of plain tensors are put into one file."""
_EMBEDDING, _HEAD, _NORM = "text.embed_tokens.weight", "head.weight", "text.norm"


@dataclass(frozen=True)
class Outcome:
    """``source_bytes`` and ``bytes``: of all tensors before and after."""

    directory: Path
    source_bytes: int
    bytes: int


def quantize_checkpoint(
    directory: Path,
    out: Path,
    formats: WeightFormats,
    prompts: Sequence[Prompt] = (),
    progress: Progress | None = None,
) -> Outcome:
    """Write the checkpoint in ``directory`` with its decoder in ``formats`` to ``out``, new or empty; with ``prompts``,
    scaled by what its layers read of them (AWQ). ``progress`` counts files.

    :class:`BadModel` for a checkpoint that is none, :class:`BadInput` for formats that do not fit it; what writing
    raises, see :func:`~.staging.staged`.
    """
    spec = read_spec(directory)
    require(formats != WeightFormats(), "there is nothing to quantise: give --weights, --head or both")
    require(not is_quantized(directory), f"{directory} is quantised already: give the 16-bit checkpoint")
    formats.check(spec.text)
    require_new(out)
    job = _Job(directory, spec, formats, map_tensors(directory, spec.prefixes))
    with staged(out, job.about(prompts)) as staging, torch.inference_mode():
        job.write(staging, prompts, progress)
    return Outcome(out, sum(each.tensor.nbytes for each in job.tensors.values()), job.written)


class _Job:
    def __init__(self, directory: Path, spec: ModelSpec, formats: WeightFormats, tensors: dict[str, Mapped]) -> None:
        self.directory, self.spec, self.formats, self.tensors = directory, spec, formats, tensors
        self.tied = _HEAD not in tensors
        self.written = 0
        self._plain = {name: each.tensor for name, each in tensors.items()}

    def about(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What the files depend on: a run that goes on with others must be about the same."""
        files = sorted(path for path in self.directory.iterdir() if path.is_file())
        asked = [[list(prompt.token_ids), [span.digest for span in prompt.spans]] for prompt in prompts]
        return {
            "source": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "formats": asdict(self.formats),
            "prompts": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
            "avl_edge": version("avl-edge"),
        }

    def write(self, staging: Path, prompts: Sequence[Prompt], progress: Progress | None) -> None:
        parts = list(self._parts())
        files = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
        calibration = Calibration(self.spec, Weights(self._plain), prompts) if prompts else None
        weight_map: dict[str, str] = {}
        for done, (file, part) in enumerate(zip(files, parts, strict=True), 1):
            # What an earlier run has written is as it would be now; its layers are run for those behind them.
            tensors = self._packed(part, calibration, skip=(staging / file).exists())
            if tensors is not None:
                save_file(tensors, staging / f"{file}.part", {"format": "pt"})
                (staging / f"{file}.part").rename(staging / file)
            with safe_open(staging / file, framework="pt") as written:
                weight_map.update(dict.fromkeys(written.keys(), file))
            self.written += (staging / file).stat().st_size
            if progress:
                progress(done, len(parts))
        index = {"metadata": {"total_size": self.written}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(staging / "model.safetensors.index.json", index)
        _write_json(staging / "config.json", self._config())
        for path in self.directory.iterdir():
            if path.is_file() and path.name != "config.json" and not _holds_weights(path.name):
                shutil.copyfile(path, staging / path.name)

    def _parts(self) -> Iterator[_Part]:
        """The files to write, in the order of the layers, then those of plain tensors."""
        left = dict(self.tensors)
        for index in range(self.spec.text.layers):
            name = f"text.layers.{index}"
            own = [each for each in left if each.startswith(f"{name}.")]
            for each in own:
                del left[each]
            yield _Part(own, name, layer_sites(name, self.spec.text) if self.formats.body else [])
        if self.formats.head is not None:
            # A head that is the embedding too would change what the first layer reads.
            own = [_EMBEDDING] if self.tied else [_HEAD, f"{_NORM}.weight"]
            yield _Part(own, "head", [] if self.tied else [Site(("head",), _NORM)])
            for each in own if not self.tied else ():
                del left[each]
        chunk: list[str] = []
        size = 0
        for each, (_, tensor) in left.items():
            if chunk and size + tensor.nbytes > _PLAIN_BYTES:
                yield _Part(chunk)
                chunk, size = [], 0
            chunk.append(each)
            size += tensor.nbytes
        yield _Part(chunk)

    def _packed(self, part: _Part, calibration: Calibration | None, *, skip: bool) -> dict[str, Tensor] | None:
        """The tensors of a part by their names in the file; None where they are there already."""
        recorder = None
        if calibration is not None and part.layer:
            recorder = calibration.head(_NORM) if part.layer == "head" else calibration.layer(part.layer)
        if skip:
            return None
        form = self.formats.head if part.layer == "head" else self.formats.body
        scaling = Scaling()
        if recorder is not None and part.sites and form is not None:
            scaling = Scaling.of(part.sites, recorder, self._plain, form)
        found: dict[str, Tensor] = {}
        for name in part.names:
            tensor = self._plain[name]
            scaled = scaling.apply(name, tensor)
            packing = form if DECODER_MATRIX.fullmatch(name) or (part.layer == "head" and tensor.ndim == 2) else None
            if packing is None:
                found[self._stored_name(name, part)] = scaled.to(tensor.dtype)
            else:
                stem = self._stored_name(name, part).removesuffix(".weight")
                packed = pack(scaled, packing, tensor.dtype)
                found |= {f"{stem}.{key}": each for key, each in stored_parts(packed, tensor.dtype).items()}
        return found

    def _stored_name(self, name: str, part: _Part) -> str:
        """Its own, but that of a head that is stored beside the embedding that it was."""
        stored = self.tensors[name].name
        if part.layer != "head" or not self.tied:
            return stored
        return "language_model.lm_head.weight" if stored.startswith("language_model.model.") else "lm_head.weight"

    def _config(self) -> dict[str, Any]:
        config = read_json(self.directory / "config.json") or {}
        config["quantization_config"] = quantization_config(self.formats)
        if self.tied and self.formats.head is not None:
            config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        return config


@dataclass(frozen=True)
class _Part:
    """Tensors of one file, by canonical name; ``layer`` they are of, and its ``sites``."""

    names: Sequence[str]
    layer: str | None = None
    sites: Sequence[Site] = ()


def _holds_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".gguf"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
