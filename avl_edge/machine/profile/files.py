"""Profiles as files: read whole or not at all, written beside and moved into place, found by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from ...errors import quoted
from ...resources import resource_files
from .reader import build, parse, write
from .schema import ANY, COSTS, VERSION, BadProfile, DeviceProfile

_END = "# end of profile\n"
_MAX_BYTES = 8 * 2**20


def read(path: str | Path) -> DeviceProfile:
    """The profile in a file. :class:`BadProfile` for one that is missing, cut off, of another version or wrong."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadProfile(f"{path} is larger than any profile")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadProfile(f"there is no profile {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadProfile(f"the profile {path} cannot be read ({error})") from None
    return loads(text, str(path))


def loads(text: str, where: str) -> DeviceProfile:
    """The profile in ``text``; ``where`` names its origin in errors."""
    data = parse(text, where)
    if not text.endswith(_END):
        raise BadProfile(f"{where} is cut off: its last line must be {_END.strip()!r}; restore it or profile again")
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise BadProfile(
            f"{where} is of profile version {quoted(version)}, but this program reads version {VERSION}: profile again"
        )
    profile = build(DeviceProfile, data, where)
    if ANY not in profile.models:
        raise BadProfile(f"{where}.models lacks {ANY!r}: the costs that hold for every model")
    memory = profile.memory
    for part in ("available_bytes", "reserve_bytes"):
        size, total = getattr(memory, part).value, memory.total_bytes.value
        if size > total:
            raise BadProfile(f"{where}.memory.{part} is {size:g}, more than the total_bytes of {total:g}")
    _check_samples(profile, where)
    return profile


def _check_samples(profile: DeviceProfile, where: str) -> None:
    for name, record in profile.models.items():
        for sample in record.samples:
            unknown = sorted(set(sample.amounts) - set(COSTS))
            if sample.ms == 0 or unknown:
                wrong = f"amounts of {', '.join(unknown)}, which no cost is for" if unknown else "a time of 0 ms"
                raise BadProfile(f"{where}.models.{name} has a sample {quoted(sample.label)} with {wrong}")


def dumps(profile: DeviceProfile) -> str:
    """The profile as the text of its file."""
    return write(profile) + _END


def require_writable(path: Path) -> None:
    """Raise :class:`BadProfile` where :func:`save` could not write, before any work is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadProfile(f"the profile {path} cannot be written ({error.strerror})") from None
    if path.is_dir():
        raise BadProfile(f"the profile {path} cannot be written (it is a folder)")


def save(profile: DeviceProfile, path: str | Path) -> None:
    """Write ``profile`` to ``path`` in one step: a file beside it is written, read back and moved into place.

    Raises :class:`BadProfile` when that cannot be done; what stood at ``path`` is untouched then.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8") as file:
            file.write(dumps(profile))
            file.flush()
            os.fsync(file.fileno())
        if read(staged) != profile:
            raise BadProfile(f"what was written for {path} does not read back as it was: the disk may be failing")
        os.replace(staged, path)
    except OSError as error:
        raise BadProfile(f"the profile {path} cannot be written ({error.strerror})") from None
    finally:
        staged.unlink(missing_ok=True)


@cache
def shipped() -> Mapping[str, DeviceProfile]:
    """All profiles that come with the package, by name."""
    return MappingProxyType({profile.name: profile for profile in map(read, resource_files("profiles/*.yaml"))})


def own(*folders: Path) -> list[tuple[Path, DeviceProfile]]:
    """The profiles in ``folders`` with their files, folder by folder, in each the newest first. One that is damaged is
    an error, not skipped over."""
    found = []
    for folder in folders:
        files = [(path, read(path)) for path in sorted(folder.glob("*.yaml"))]
        found += sorted(files, key=lambda each: each[1].date, reverse=True)
    return found
