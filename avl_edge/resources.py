"""Files that come with the package and lie beside it in the repository: CUDA sources, device profiles, build recipes.

An installed package holds them under its own folder, at the same paths: setup.py copies them there.
"""

from __future__ import annotations

from pathlib import Path

from .errors import AvlEdgeError

_PACKAGE = Path(__file__).resolve().parent


class BrokenInstallation(AvlEdgeError):
    """Files that come with the package are not there."""


def resource_files(pattern: str) -> list[Path]:
    """The files that match ``pattern``, a path from the repository's root such as ``profiles/*.yaml``, sorted.

    Raises :class:`BrokenInstallation` where there is none.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if found := sorted(root.glob(pattern)):
            return found
    raise BrokenInstallation(f"{pattern} is missing from the installation in {_PACKAGE}: install avl-edge again")
