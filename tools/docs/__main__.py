"""Renew the tables of the pages in ``docs/`` from ``docs/measurements/``, in place: ``python -m tools.docs``."""

from __future__ import annotations

import sys

from tools.docs.markdown import ROOT
from tools.docs.pages import PAGES, renewed


def main() -> None:
    """Rewrite each page that differs, and say which."""
    if sys.argv[1:]:
        sys.exit(f"it takes no arguments, not {sys.argv[1]!r}: {__doc__}")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        try:
            made = renewed(text)
        except ValueError as error:
            sys.exit(f"{page.relative_to(ROOT)}: {error}")
        if made != text:
            page.write_text(made, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
