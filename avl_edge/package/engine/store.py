"""Packages on disk: published in one step, opened only whole.

    OUT/                  readable as the umask has it, or as it was; nobody else may write, here or below
      lock                held by the one process that builds
      manifest.json       names the directory that counts, and the size and digest of each of its files
      build-XXXXXXXX/     the files
      staging-XXXXXXXX/   a build that goes on, or that was cut off; no one opens it

A build fills a staging directory, renames it and then replaces the manifest, which is what publishes it: at every
moment OUT holds the old package or the new one, whole. A directory that is no longer named is removed by the builder
that holds the lock, unless a reader still has it open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..directory import LOCK, MANIFEST, flush
from . import manifest as manifests
from .errors import BadPackage, BuildFailed, BuildRunning, rebuild
from .fingerprint import Fingerprint, require_match
from .manifest import File, Manifest

_STAGING, _BUILT = "staging-", "build-"
_EXECUTED = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH
_WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file is too large"}


@dataclass(frozen=True)
class Package:
    """A package whose files, all or those asked for, were verified; while it is open no builder removes them. Use it in
    a ``with``."""

    directory: Path
    manifest: Manifest
    _checked: frozenset[str]
    _descriptor: int

    def __getitem__(self, name: str) -> Path:
        """The path of a file; :class:`BadPackage` for one that the package does not have."""
        if name not in self.manifest.files:
            raise BadPackage(f"{self.directory.parent} has no {name}: {rebuild(self.directory.parent)}")
        if name not in self._checked:
            raise KeyError(f"{name} was not verified: the package was opened for other files")
        return self.directory / name

    def __enter__(self) -> Package:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def open_package(out: Path, wanted: Fingerprint | None = None, files: Collection[str] | None = None) -> Package:
    """The package in ``out``, every byte of it checked against its digest: seconds for several GB. Where only some
    ``files`` are needed, those of them that the package has are checked and can be had.

    :class:`BadPackage` where there is none or not all of it, :class:`~.errors.Mismatch` where it is not as ``wanted``.
    """
    while True:
        manifest = _read_manifest(out)
        if wanted is not None:
            require_match(manifest.fingerprint, wanted, out)
        try:
            return _open_files(out, manifest, files)
        except BadPackage:
            # A build that ended in between has moved the package: then what it published counts.
            if _read_manifest(out) == manifest:
                raise


def _read_manifest(out: Path) -> Manifest:
    path = out / MANIFEST
    try:
        _refuse_foreign(out)
        return manifests.loads(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise BadPackage(f"{out} holds no package: build one with avl-edge build MODEL --out {out}") from None
    except UnicodeDecodeError:
        raise BadPackage(f"{path} is cut off or damaged: {rebuild(out)}") from None
    except OSError as error:
        raise BadPackage(f"{path} cannot be read ({error.strerror}): give the directory of a package") from None


def _open_files(out: Path, manifest: Manifest, files: Collection[str] | None) -> Package:
    directory = out / manifest.directory
    with _reading(directory, out):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            _refuse_foreign(directory)
            checked = {name: file for name, file in manifest.files.items() if files is None or name in files}
            for name, file in checked.items():
                _verify(directory / name, file, out)
        except BaseException:
            os.close(descriptor)
            raise
    return Package(directory, manifest, frozenset(checked), descriptor)


@contextmanager
def _reading(path: Path, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadPackage(f"{path} cannot be read ({error.strerror}): {rebuild(out)}") from None


def _refuse_foreign(directory: Path) -> None:
    """Engines are programs: what another user could have written is not opened."""
    state = directory.stat()
    if state.st_uid not in (os.getuid(), 0) or stat.S_IMODE(state.st_mode) & _WRITTEN_BY_OTHERS:
        raise BadPackage(f"{directory} belongs to another user or can be written by one: chown it and chmod go-w it")


def _verify(path: Path, expected: File, out: Path) -> None:
    with _reading(path, out):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BadPackage(f"{path} is not a plain file: {rebuild(out)}")
        size = path.stat().st_size
        if size != expected.bytes:
            what = f"has {size} bytes instead of {expected.bytes}, it was cut off or changed"
            raise BadPackage(f"{path} {what}: {rebuild(out)}")
        if File.of(path) != expected:
            raise BadPackage(f"{path} was changed after it was built, its digest is another: {rebuild(out)}")


def publish(out: Path, version: str, fill: Callable[[Path], Fingerprint]) -> Manifest:
    """Build a package in ``out``: ``fill`` writes the files into the directory it is given and says what they are.

    Whatever goes wrong, what was in ``out`` before is still there and nothing else is. :class:`BuildRunning` where
    another process builds there, :class:`BuildFailed` where the disk does not take it, and what ``fill`` raises.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _only_builder(out):
            _sweep(out)
            try:
                return _publish(out, version, fill)
            finally:
                # What cannot be removed is left to the next build: it changes nothing of what was published.
                with suppress(OSError):
                    _sweep(out)
    except OSError as error:
        reason = _NO_ROOM.get(error.errno or 0, error.strerror or str(error))
        cure = "free some space, or give another --out" if error.errno in _NO_ROOM else "give another --out"
        raise BuildFailed(f"{out} cannot be written ({reason}), what was there before is untouched: {cure}") from None


@contextmanager
def _only_builder(out: Path) -> Iterator[None]:
    """Hold the lock; the kernel lets go of it when the process ends, however it ends."""
    _require_own(out)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildRunning(f"another build is running in {out}: wait for it, or give another --out") from None
        yield
    finally:
        os.close(descriptor)


def _require_own(out: Path) -> None:
    """An existing directory has to be empty or a package's: nothing of anyone else's is replaced or swept away.

    Every package has a lock, while others have a manifest.json or a build-something too.
    """
    names = {path.name for path in out.iterdir()}
    foreign = sorted(name for name in names if LOCK not in names or not _is_own(name))
    if foreign:
        raise BadPackage(f"{out} holds other files ({foreign[0]}): give --out a new or empty directory")
    out.chmod(stat.S_IMODE(out.stat().st_mode) & ~_WRITTEN_BY_OTHERS)


def _is_own(name: str) -> bool:
    return name in (LOCK, MANIFEST) or name.startswith((_STAGING, _BUILT))


def _publish(out: Path, version: str, fill: Callable[[Path], Fingerprint]) -> Manifest:
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=out))
    fingerprint = fill(staging)
    files = {path.name: File.of(path) for path in sorted(staging.iterdir())}
    manifest = Manifest(version, staging.name.replace(_STAGING, _BUILT, 1), fingerprint, files)
    text = out / f"{_STAGING}{MANIFEST}"
    text.write_text(manifest.dumps(), encoding="utf-8")
    readers = stat.S_IMODE(out.stat().st_mode)
    for path in (*staging.iterdir(), staging, text):
        path.chmod(readers if path.is_dir() else readers & ~_EXECUTED)  # libraries make files for their user alone
        flush(path)
    staging.rename(out / manifest.directory)
    text.replace(out / MANIFEST)
    flush(out)
    return manifest


def _sweep(out: Path) -> None:
    """Remove what the manifest does not name and no reader has open; the lock is held, so nobody is writing it."""
    leftovers: tuple[str, ...] = (_STAGING,)
    current = None
    with suppress(BadPackage):  # a manifest that cannot be read says nothing of what was built
        current = _read_manifest(out).directory
        leftovers = (_STAGING, _BUILT)
    for path in out.iterdir():
        if path.name.startswith(leftovers) and path.name != current:
            _remove_unread(path)


def _remove_unread(path: Path) -> None:
    """Remove a file or directory unless it is open; who comes to read it meanwhile waits, and finds it gone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(descriptor)
