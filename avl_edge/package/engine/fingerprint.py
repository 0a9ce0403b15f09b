"""What a package was built from and for: the fields that have to agree before it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from ...errors import BadModel
from ...machine.device import DeviceFacts
from .errors import Mismatch, rebuild

_CHUNK = 2**22
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is read of a model beside its weights; a package brings them along."""


@dataclass(frozen=True)
class Platform:
    """The machine that engines run on, and the kernel that their plugin launches; engines are not portable across any
    of it. ``kernel`` is the digest of its source. None: not found on this machine, or not part of the engines."""

    tensorrt: str | None = None
    cuda: str | None = None
    sm: str | None = None
    l4t: str | None = None
    kernel: str | None = None

    @classmethod
    def of(cls, facts: DeviceFacts, kernel: str | None = None) -> Platform:
        """The platform that a probed machine is."""
        software = facts.software
        sm = facts.gpus[0].sm if facts.gpus else None
        return cls(software.tensorrt, software.cuda, sm, software.l4t, kernel)


@dataclass(frozen=True)
class Fingerprint:
    """``model`` is the digest of the checkpoint, ``graphs`` that of the ONNX graphs without their weights;
    ``prune_after`` the layer after which they can prune, None for nowhere; ``shapes`` are the largest sizes that are
    served, by name. ``platform`` None: graphs alone, which hold on every machine."""

    model: str
    graphs: str
    precision: str
    prune_after: int | None
    shapes: dict[str, int]
    platform: Platform | None = None


_WORDS = {
    "model": "checkpoint",
    "graphs": "form of the ONNX graphs",
    "prune_after": "layer to prune after",
    "tensorrt": "TensorRT",
    "cuda": "CUDA",
    "sm": "compute capability",
    "l4t": "L4T release",
    "kernel": "attention kernel",
}


def require_match(built: Fingerprint, wanted: Fingerprint, out: Path) -> None:
    """:class:`Mismatch` for the first field in which the package in ``out`` is not what is wanted.

    A package without engines is good where none are wanted, one with engines also where only its graphs are.
    """
    # The precision decides the graphs too: the field that a person set is named first.
    pairs = _fields(built, wanted, ("model", "precision", "prune_after", "shapes", "graphs"))
    if wanted.platform is not None:
        if built.platform is None:
            raise Mismatch("platform", f"{out} holds ONNX graphs but no engines: {rebuild(out)} on the device")
        pairs = [*pairs, *_fields(built.platform, wanted.platform, [field.name for field in fields(Platform)])]
    for name, was, now in pairs:
        if was != now:
            what = _WORDS.get(name, name)
            raise Mismatch(name, f"{out} was built for another {what} ({_differ(was, now)}): {rebuild(out)}")


def _fields(built: object, wanted: object, names: Iterable[str]) -> list[tuple[str, object, object]]:
    return [(name, getattr(built, name), getattr(wanted, name)) for name in names]


def _differ(was: object, now: object) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        parts = [f"{key} {was.get(key)}, now {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)]
        return "; ".join(parts)
    return f"{_short(was)}, now {_short(now)}"


def _short(value: object) -> str:
    """Twelve digits tell digests apart."""
    return "none" if value is None else text[:12] if len(text := str(value)) == 64 else text


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoint_digest(directory: Path) -> str:
    """SHA-256 over what decides a checkpoint's answers: its :data:`MODEL_FILES` and weights, names included.

    Reads every byte: seconds for a model of several GB.
    """
    digest = hashlib.sha256()
    try:
        for path in _checkpoint_files(directory):
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    except OSError as error:
        raise BadModel(f"{error.filename} cannot be read ({error.strerror}): copy the checkpoint again") from None
    return digest.hexdigest()


def _checkpoint_files(directory: Path) -> Iterator[Path]:
    yield from model_files(directory)
    yield from sorted((*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")))


def model_files(directory: Path) -> Iterator[Path]:
    """Those of :data:`MODEL_FILES` that a checkpoint has, and its config.json in any case."""
    yield directory / "config.json"
    yield from (directory / name for name in MODEL_FILES[1:] if (directory / name).is_file())
