"""Tables of ``docs/quality.md``: answers against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tools.docs.markdown import block, measured, percent, table

Row = dict[str, Any]
Rows = Mapping[tuple[str, float], Row]

SHARES = (0.5, 0.25, 0.125, 0.09, 0.0625, 0.04)
LOW_RANK = "avl:prompt_mean=1:format=int8:secondary_format=lowrank:32+int8"
EQUAL_BYTES = {
    "distinct:format=int4": "`distinct`, int4",
    "coarse:format=int4": "`coarse`, int4",
    "avl:by_values=1:format=int4": "`avl`, `by_values=1`, int4",
    "avl:prompt_mean=1:format=int4": "`avl`, `prompt_mean=1`, int4",
    "distinct": "`distinct`",
    LOW_RANK: "`avl`, `prompt_mean=1`, int8, secondary rows `lowrank:32+int8`",
    "avl:prompt_mean=1:secondary_format=int8": "`avl`, `prompt_mean=1`, secondary rows int8",
    "avl:prompt_mean=1": "`avl`, `prompt_mean=1`",
    "avl": "`avl` as published",
    "h2o": "`h2o`",
    "fastv": "`fastv`",
    "streaming": "`streaming`",
    "random": "`random` rows",
}
NOTHING_EVICTED = {
    "full": "`full`",
    "full:format=int8": "`full`, int8",
    "full:format=int4": "`full`, int4",
    "attentionpack": "`attentionpack`",
    "coarse:secondary=100:core=25:mass=100": "the best 25 % of the rows by true attention at every step",
    "coarse:secondary=100:core=10:mass=100": "the best 10 %, likewise",
}
NO_GAIN = {
    ("coarse:format=int4", 0.0625): "`coarse`, int4",
    ("coarse:format=int4:by_mass=1", 0.0625): "`coarse`, int4, `by_mass=1` (one threshold for all layers)",
    ("coarse:format=int4", 0.04): "`coarse`, int4",
    ("coarse:format=int4:by_mass=1", 0.04): "`coarse`, int4, `by_mass=1`",
    ("avl", 0.25): "`avl` as published",
    ("avl:drift=20", 0.25): "`avl`, `drift=20` (refresh by drift)",
}
KVPRESS = {
    "distinct:format=int4": "`distinct`, int4",
    "distinct": "`distinct`",
    "kvpress:keydiff": "kvpress: KeyDiff",
    "kvpress:snapkv:window_size=8": "kvpress: SnapKV, window 8",
    "kvpress:expected": "kvpress: expected attention",
    "avl": "`avl` as published",
    "kvpress:snapkv": "kvpress: SnapKV, window 64",
    "h2o": "`h2o`",
    "kvpress:observed": "kvpress: observed attention",
    "kvpress:tova": "kvpress: TOVA",
    "kvpress:streaming": "kvpress: StreamingLLM",
    "streaming": "`streaming`",
    "kvpress:knorm": "kvpress: Knorm",
}


def rows(name: str) -> Rows:
    """The results of an evaluation by (setting, share of full attention's bytes)."""
    return {(row["method"], row["kv_fraction"]): row for row in measured(name)["result"]["results"]}


def _headings(shares: Sequence[float]) -> list[str]:
    return [f"{100 * share:g} %" for share in shares]


def _stores_all(row: Row) -> bool:
    return bool(row["parameters"].get("secondary") == 100)


def _star_note(found: list[Row]) -> str:
    """What the asterisk behind a score means, where ``found`` has one."""
    stored = sorted({percent(row["bytes_stored_fraction"], 0) for row in found if _stores_all(row)})
    return f"`*`: every image row is stored, in {' or '.join(stored)} % of the bytes. " if stored else ""


def equal_bytes() -> str:
    """Exact match, and in brackets what a decode step reads, by method and share."""
    document = measured("methods")["result"]
    found = rows("methods")
    refused = {(each["method"], each["kv_fraction"]) for each in document["unreachable"]}

    def cell(setting: str, share: float) -> str:
        row = found.get((setting, share))
        if row is None:  # what cannot hold a share holds no smaller one
            return "cannot" if any(method == setting and share <= most for method, most in refused) else ""
        star = "*" if _stores_all(row) else ""
        return f"{percent(row['score'])} ({percent(row['bytes_read_fraction'], 0)}){star}"

    body = table(
        ["exact match, % (bytes read, %)", *_headings(SHARES)],
        [[label, *(cell(setting, share) for share in SHARES)] for setting, label in EQUAL_BYTES.items()],
    )
    shown = [row for (setting, share), row in found.items() if setting in EQUAL_BYTES and share in SHARES]
    about = f"{document['questions']} questions. {_star_note(shown)}Empty: not evaluated. {_intervals(shown)}"
    return block(f"{body}\n\n{about}", "methods")


def _intervals(found: list[Row]) -> str:
    """How wide the 95 % intervals are, near full attention and elsewhere."""
    half = [(row["score"], (row["score_interval"][1] - row["score_interval"][0]) / 2) for row in found]
    near = [width for score, width in half if score >= 0.92]
    far = [width for score, width in half if score < 0.85]
    return (
        f"95 % intervals: {percent(min(near))} to {percent(max(near))} points to either side of scores from 92, "
        f"{percent(min(far))} to {percent(max(far))} of those below 85."
    )


def nothing_evicted() -> str:
    """Every row stored: what formats cost, and how little a step would have to read."""
    found = rows("methods")

    def line(setting: str, label: str) -> list[str]:
        row = found[setting, 1]
        low, high = row["score_interval"]
        shares = (row["bytes_stored_fraction"], row["bytes_read_fraction"], row["rows_read_fraction"])
        return [label, percent(row["score"]), f"{percent(low)} to {percent(high)}", *(percent(x, 0) for x in shares)]

    header = ["every row stored", "exact match, %", "95 % interval", "bytes stored, %", "bytes read, %", "rows read, %"]
    return block(table(header, [line(*each) for each in NOTHING_EVICTED.items()]), "methods")


def no_gain() -> str:
    """Ideas beside what they were to improve, at the same share."""
    found = rows("methods")
    lines = [
        [label, f"{100 * share:g} %", percent(row["score"]), percent(row["bytes_read_fraction"])]
        for (setting, share), label in NO_GAIN.items()
        for row in [found[setting, share]]
    ]
    return block(table(["", "share", "exact match, %", "bytes read, %"], lines), "methods")


def _by_share(name: str, labels: Mapping[str, str], shares: Sequence[float], digits: int = 1) -> str:
    """Exact match by setting and share; `*` where every image row is stored in less."""
    found = rows(name)
    questions = measured(name)["result"]["questions"]
    lines = [[label, *(_score(found[setting, share], digits) for share in shares)] for setting, label in labels.items()]
    whole = percent(found["full", 1]["score"], digits)
    body = table([f"exact match, %, of {questions} questions (`full`: {whole})", *_headings(shares)], lines)
    shown = [found[setting, share] for setting in labels for share in shares]
    return block("\n\n".join(filter(None, [body, _star_note(shown).strip()])), name)


def _score(row: Row, digits: int) -> str:
    return percent(row["score"], digits) + ("*" if _stores_all(row) else "")


def unseen() -> str:
    """Questions of a seed by which nothing was chosen."""
    return _by_share("methods_unseen", {"distinct:format=int4": "`distinct`, int4"}, (0.25, 0.125, 0.0625))


def camera() -> str:
    """Pictures with uneven light, texture and noise."""
    settings = ("distinct:format=int4", "coarse:format=int4", "avl:prompt_mean=1:format=int4", "avl", "h2o")
    return _by_share("methods_camera", {each: EQUAL_BYTES[each] for each in settings}, (0.25, 0.125, 0.0625))


def kvpress() -> str:
    """The presses of kvpress, and this runtime's methods, on one checkpoint."""
    return _by_share("kvpress", KVPRESS, (0.5, 0.25, 0.125), digits=0)


TABLES = {
    "quality": equal_bytes,
    "nothing-evicted": nothing_evicted,
    "no-gain": no_gain,
    "unseen": unseen,
    "camera": camera,
    "kvpress": kvpress,
}
