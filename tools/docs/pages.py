"""The generated blocks of a page.

A block stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; the lines between are made from measurements and
replaced whole. Everything else of a page is written by hand.
"""

from __future__ import annotations

import re

from tools.docs import demo_model, device, quality, real_decoder, speed
from tools.docs.markdown import ROOT

TABLES = {**quality.TABLES, **speed.TABLES, **demo_model.TABLES, **device.TABLES, **real_decoder.TABLES}
PAGES = sorted((ROOT / "docs").glob("*.md"))
OPENING = re.compile(r"<!-- table: (.*?) -->\n")
BLOCK = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def renewed(text: str) -> str:
    """A page's ``text`` with its blocks made anew; ValueError for a block without an end or of an unknown name."""
    opened, closed = OPENING.findall(text), BLOCK.findall(text)
    if opened != [name for name, _ in closed] or text.count("<!-- end -->") != len(closed):
        raise ValueError(f"not every block ends before the next begins: {', '.join(opened)}")
    unknown = set(opened) - set(TABLES)
    if unknown:
        raise ValueError(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    return BLOCK.sub(lambda found: f"<!-- table: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)


def without_blocks(text: str) -> str:
    """What is written by hand."""
    return BLOCK.sub("", text)
