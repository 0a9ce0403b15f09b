"""Settings of an evaluation: a share of full attention's memory in a method's own parameters and formats."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avl_edge import DoesNotFit
from avl_edge.config import Formats, KvShape, PromptShape
from avl_edge.kv.layout import PAGE_ROWS
from avl_edge.kv.methods import METHODS
from avl_edge.measure.evaluate import Setting, settings_of


class TestSettings:
    @given(
        # AttentionPack's own formats are for rows of more dimensions than these have.
        st.sampled_from([name for name in METHODS if name not in ("full", "attentionpack")]),
        st.integers(1, 100),
        st.builds(PromptShape, st.integers(0, 40), st.integers(1, 2000), st.integers(1, 200)),
        st.integers(1, 12),
    )
    def test_the_share_is_kept_and_used(self, method: str, percent: int, prompt: PromptShape, layers: int) -> None:
        setting, shape = Setting(method, percent / 100), KvShape(layers, 2, 8, 2)
        try:
            options = setting.options(prompt, shape, 10)
        except DoesNotFit:
            return
        assert options.formats == Formats()
        rows = METHODS[method](**options.parameters).peak_rows(prompt, 0, layers)
        held = -(-rows // PAGE_ROWS) * PAGE_ROWS
        allowed = -(-layers * prompt.length * percent // (100 * PAGE_ROWS)) * PAGE_ROWS  # a share in whole pages
        assert held <= allowed
        if method == "h2o":
            assert held > allowed - layers * (1 + prompt.length / 100) - PAGE_ROWS

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("h2o", {"budget": 50}),  # half of the prompt's 600 rows
            ("avl", {"secondary": 48, "core": 32, "prefill_keep": 90}),  # 276 of 576, and 24 rows of text
            ("fastv", {"layer": 2, "drop": 70}),  # six of eight layers lose 403 or more of 576 tokens
            ("streaming", {"sinks": 4, "window": 296}),
            ("avl:prompt_mean=1:refresh=1", {"secondary": 48, "core": 32, "prompt_mean": 1, "refresh": 1}),
            # Half of 300 pages: 130 of 24 text and 236 core rows in 8 layers, 18 of 121 int4 rows, 56 to a page.
            ("avl:secondary_format=int4", {"secondary": 62, "core": 41, "prefill_keep": 90}),
            # 30 int8 rows to a page: 24 text and 534 image rows in 8 layers, and a page for what smooths their keys.
            ("coarse:format=int8:mass=90", {"secondary": 92, "mass": 90}),
        ],
    )
    def test_half_of_the_demo_models_prompt(self, method: str, parameters: dict[str, float]) -> None:
        options = Setting(method, 0.5).options(PromptShape(4, 576, 20), KvShape(8, 4, 64, 2), 160)
        assert parameters.items() <= {**options.parameters}.items()

    @pytest.mark.parametrize(
        ("method", "formats"),
        [
            ("avl", Formats()),
            ("avl:secondary_format=int8", Formats("exact", "exact", "int8")),
            ("coarse:format=int8:mass=90", Formats("int8", "int8", "int8")),
            ("full:format=int4:text_format=exact", Formats("exact", "int4", "int4")),
            ("full:format=lowrank:8@4+int8", Formats("exact", "lowrank:8@4+int8", "lowrank:8@4+int8")),
        ],
    )
    def test_formats_are_part_of_a_setting(self, method: str, formats: Formats) -> None:
        options = Setting(method, 1.0).options(PromptShape(4, 576, 20), KvShape(8, 4, 64, 2), 160)
        assert (options.method, options.formats) == (method.partition(":")[0], formats)

    def test_full_comes_once_and_first(self) -> None:
        settings = settings_of(["avl", "full", "avl"], [0.5, 0.25, 0.5])
        assert settings == [Setting("full"), Setting("avl", 0.5), Setting("avl", 0.25)]
