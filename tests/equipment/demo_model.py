"""Shared by the tests of the demo model's tools: the shipped tokenizer, a scene's facts, and how hard to try."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from avl_edge.model.demo import DEMO
from tools.demo_model.facts import Facts
from tools.demo_model.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(DEMO / "tokenizer.json")
seeds = st.integers(0, 10**9)
quickly = settings(max_examples=25, deadline=None)

FACTS = Facts(
    screen=("16:17 WIND", "CALL ANNA", "RADIO 12"),
    sign=(("PARIS", 112), ("LYON", 30)),
    speed=87,
    unit="km/h",
    gear="D",
    fuel=40,
    temperature=-3,
    limit=60,
    light="red",
    lamps=("oil",),
    plate="AB123C",
    cars=("red", "blue", "red"),
)
