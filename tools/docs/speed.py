"""Tables of ``docs/speed.md``: times on a CPU, and plans beside what was then measured."""

from __future__ import annotations

from typing import Any

from tools.docs.markdown import block, measured, percent, table


def decode() -> str:
    """A decode step at LLaVA-1.5-7B's layer shape, A-VL's beside full attention's."""
    document = measured("decode")
    cases = {(case["image_rows"], case["method"]): case for case in document["cases"]}

    def line(case: dict[str, Any]) -> list[object]:
        full = cases[case["image_rows"], "full"]
        step, attention = "ms_per_token", "attention_ms_per_token"
        return [
            f"{case['image_rows']:,} image rows, `{case['method']}`",
            f"{case[attention]:.2f}",
            f"{case[attention] / full[attention]:.2f}",
            f"{case[step]:.1f}",
            f"{case[step] / full[step]:.2f}",
            f"{case['rows_read_per_step']:,.0f}",
        ]

    header = ["", "attention, ms", "of `full`'s", "whole step, ms", "of `full`'s", "rows read, 2 layers"]
    about = f"{document['model']}, {document['machine']['threads']} threads"
    return block(f"{table(header, map(line, document['cases']))}\n\n{about[0].upper()}{about[1:]}.", "decode")


def native_step() -> str:
    """The demo's decode step as one native call, torch's beside it."""
    document = measured("native_step")

    def line(case: dict[str, Any]) -> list[object]:
        names = set(case["formats"].values())
        label = f"`{case['method']}`{'' if names == {'exact'} else ', ' + names.pop()}"
        times = [f"{case[name]:.2f}" for name in ("torch_ms", "native_ms", "native_to_torch", "host_ms")]
        return [label, case["threads"], *times]

    header = ["", "threads", "torch, ms", "native, ms", "of torch's", "of it on the host, ms"]
    return block(table(header, map(line, document["steps"])), "native_step")


def products() -> str:
    """What products with one vector read per second."""
    document = measured("native_step")
    header = ["threads", "a plain sum, GB/s", "bfloat16, of it", "int8", "int4"]
    lines = [
        [
            case["threads"],
            f"{case['sum_gb_per_s']:.1f}",
            *[f"{case[name]:.2f}" for name in ("bfloat16", "int8", "int4")],
        ]
        for case in document["products"]
    ]
    return block(table(header, lines), "native_step")


def attention() -> str:
    """The kernel beside torch's ways."""
    document = measured("attention_cpu")
    cases = document["result"]["cases"]

    def line(case: dict[str, Any]) -> list[object]:
        ms = case["ms"]
        others = ("slice_then_multiply", "full", "contiguous")
        ratios = [f"{ms[other]:.2f} ({ms['native'] / ms[other]:.2f})" for other in others]
        return [f"{case['kv_heads']} key/value heads, batch {case['batch']}", f"{ms['native']:.2f}", *ratios]

    header = [
        "ms (kernel's time / this time)",
        "the kernel, where the rows lie",
        "torch: gather, then multiply",
        "torch: all rows",
        "torch: rows that lie side by side already",
    ]
    case = cases[0]
    shape = (
        f"{percent(case['core_fraction'], 0)} % of {case['rows']:,} rows, {case['heads']} heads of {case['head_dim']}, "
        f"{case['dtype']}, threads: {document['result']['machine']['threads']}."
    )
    return block(f"{table(header, map(line, cases))}\n\n{shape}", "attention_cpu")


def host() -> str:
    """What a decode step asks of the host beside a GPU, and what the end of a sequence does."""
    result = measured("host")["result"]

    def line(case: dict[str, Any]) -> list[object]:
        packed = ", ".join(f"{tier} {name}" for tier, name in case["formats"].items() if name != "exact")
        label = f"`{case['method']}`{f', {packed}' if packed else ''}"
        steps = [case.get(name) for name in ("ordinary", "refresh")]
        times = [f"{step[name]:.2f}" if step else "" for step in steps for name in ("before_ms", "settle_ms")]
        return [label, case["batch"], *times]

    names = ("before the launch, ms", "after it or its scores, ms")
    header = ["", "sequences", *names, *(f"refresh: {name}" for name in names)]
    close = result["close"]
    ending = (
        f"A sequence of {close['tokens']:,} tokens in {close['layers']} layers gives its rows back in {close['ms']} ms."
    )
    return block(f"{table(header, map(line, result['cases']))}\n\n{ending}", "host")


def plans() -> str:
    """Requests as the profile planned them, and as they then ran."""
    result = measured("profile_verify")["result"]

    def line(each: dict[str, Any]) -> list[object]:
        times = (each["predicted_ms_per_token"], each["measured_ms_per_token"])
        sizes = (each["predicted_peak_bytes"] / 1e6, each["measured_peak_bytes"] / 1e6)
        return [each["request"], *(f"{ms:.1f}" for ms in times), *(f"{mb:.0f}" for mb in sizes)]

    header = ["request", "planned ms/token", "measured", "planned peak, MB", "measured"]
    bytes_error = result["bytes_error_percent"]
    summary = (
        f"Time per token: {result['median_ms_error_percent']:.0f} % off in the median of {len(result['requests'])} "
        f"requests to the `{result['model']}` model. Memory: {bytes_error['least']:.1f} to {bytes_error['most']:.1f} % "
        "more planned than used."
    )
    return block(f"{summary}\n\n{table(header, map(line, result['requests']))}", "profile_verify")


def orin() -> str:
    """Plans for a Jetson beside what others measured there."""
    result = measured("orin_plans")["result"]

    def figure(case: dict[str, Any], name: str) -> str:
        ours, theirs = case["planned"][name], case[name]
        if theirs is None:
            return f"{ours}"
        return f"{ours} ({theirs}, {100 * (ours / theirs - 1):+.0f} %)"

    def line(case: dict[str, Any]) -> list[object]:
        names = ("tokens_per_s", "encode_ms", "prefill_ms", "memory_gb")
        shown = [f"`{case['model']}`, {case['rows']:,} rows", case["source"] or "none known"]
        return [*shown, *(figure(case, name) for name in names)]

    header = ["planned (measured, deviation)", "measured by", "tokens/s", "picture, ms", "prompt, ms", "memory, GB"]
    about = f"{result['device']}, {result['power_mode']}, weights {result['weights']}, head and rows fp16."
    return block(f"{table(header, map(line, result['cases']), words=2)}\n\n{about}", "orin_plans")


TABLES = {
    "decode": decode,
    "native-step": native_step,
    "native-products": products,
    "attention": attention,
    "host": host,
    "plans": plans,
    "orin": orin,
}
