"""The page at ``/``: whole in one file, nothing from elsewhere; in a browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.equipment.served import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


@pytest.fixture
def page(served: Served) -> tuple[dict[str, str], str]:
    status, headers, text = served.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    return headers, text


def test_it_asks_nobody_else(page: tuple[dict[str, str], str]) -> None:
    headers, text = page
    outline = _Outline()
    outline.feed(text)
    for _, attributes in outline.elements:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|//[a-z]+\.", text)
    policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    for name in ("script", "style"):
        content = text.split(f"<{name}>")[1].split(f"</{name}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"


def test_everything_that_is_typed_into_has_a_label(page: tuple[dict[str, str], str]) -> None:
    outline = _Outline()
    outline.feed(page[1])
    labels = {attributes.get("for") for tag, attributes in outline.elements if tag == "label"}
    fields = {attributes.get("id") for tag, attributes in outline.elements if tag in ("input", "textarea", "select")}
    assert fields <= labels
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("(\w+)"\)', page[1]))
    assert used <= set(ids)
    assert ("html", {"lang": "en"}) in outline.elements


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it(served: Served, tmp_path: Path, width: int) -> None:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    options = ["--virtual-time-budget=4000", f"--user-data-dir={tmp_path}", "--dump-dom"]
    address = f"http://127.0.0.1:{served.port}/"
    done = subprocess.run([*command, *options, address], capture_output=True, text=True, timeout=120)
    assert "<title>avl-edge: test</title>" in done.stdout
    assert "promised" in done.stdout
