"""An estimate as text for people. Predictions that rest on derived numbers say so where they stand."""

from __future__ import annotations

from itertools import groupby

from ...config import format_size
from ...kv.methods import Tiers
from ...machine.profile import Basis, short
from .estimate import Estimate


def report(estimate: Estimate) -> str:
    """An estimate as a table, one line a fact."""
    rows = [
        ("model", f"{estimate.model.name}, weights {_weights(estimate)}"),
        ("device", _device(estimate)),
        ("prompt", _prompt(estimate)),
        ("method", _method(estimate)),
        *_memory(estimate),
        *_kv(estimate),
        *_time(estimate),
    ]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}\n" for name, text in rows)


def _weights(estimate: Estimate) -> str:
    body, head = estimate.weights.body, estimate.weights.head
    return body if body == head else f"{body} (head {head})"


def _device(estimate: Estimate) -> str:
    mode = f" in power mode {short(estimate.profile.power_mode.name).upper()}" if estimate.profile.power_mode else ""
    return f"{estimate.profile.device.name}{mode} (profile {estimate.profile.name} of {estimate.profile.date})"


def _prompt(estimate: Estimate) -> str:
    prompt = estimate.prompt
    streams = f", {estimate.request.streams} streams" if estimate.request.streams > 1 else ""
    text = (
        f"{prompt.prefix} text + {prompt.images} image + {prompt.suffix} text tokens, {estimate.steps + 1} new{streams}"
    )
    cut = estimate.request.max_new_tokens - estimate.steps - 1
    return f"{text} (cut by {cut}: the context ends)" if cut else text


def _method(estimate: Estimate) -> str:
    settings = estimate.to_dict()["settings"]
    return " ".join([estimate.method.name, *(f"{name}={value:g}" for name, value in settings.items())])


def _memory(estimate: Estimate) -> list[tuple[str, str]]:
    memory, streams = estimate.memory, estimate.request.streams
    share = f"{format_size(estimate.kv.bytes_peak)} x {streams}" if streams > 1 else "at most"
    return [
        ("weights", format_size(memory.weights_bytes)),
        ("vision workspace", f"{format_size(memory.vision_bytes)} (while pictures are encoded)"),
        ("activations", f"{format_size(memory.activations_bytes)} (while a prompt is read)"),
        ("KV rows", f"{format_size(memory.kv_bytes)} ({share})"),
        ("overhead", format_size(memory.overhead_bytes)),
        (
            "peak memory",
            f"{format_size(memory.peak_bytes)} of {format_size(memory.limit_bytes)} {_basis(estimate, memory.basis)}",
        ),
    ]


def _kv(estimate: Estimate) -> list[tuple[str, str]]:
    kv = estimate.kv
    kept = 100 * kv.bytes_stored / kv.bytes_full
    sizes = " / ".join(map(format_size, (kv.bytes_stored, kv.bytes_peak, kv.bytes_full)))
    return [("KV stored / peak / full", f"{sizes} a request, {kept:.0f} % stored"), *_layers(kv.layers)]


def _layers(layers: tuple[Tiers, ...]) -> list[tuple[str, str]]:
    """Neighbouring layers that hold the same, in one line."""
    lines, first = [], 0
    for held, group in groupby(layers):
        last = first + len(list(group)) - 1
        name = f"layers {first}-{last}" if last > first else f"layer {first}"
        rows = f"{held.text} text, {held.core} core, {held.secondary} secondary rows, {held.freed} freed"
        lines.append((name, rows))
        first = last + 1
    return lines


def _time(estimate: Estimate) -> list[tuple[str, str]]:
    time, streams = estimate.time, estimate.request.streams
    together = f", {streams * time.tokens_per_s:.1f} with all streams" if streams > 1 else ""
    first = f"{time.ttft_ms:.0f} ms (pictures {time.encode_ms:.0f}, prompt {time.prefill_ms:.0f})"
    per_token = f"{time.ms_per_token:.2f} ms, {time.tokens_per_s:.1f} tokens/s{together}"
    return [
        ("first token", f"{first} {_basis(estimate, time.basis)}"),
        ("per token", f"{per_token} {_basis(estimate, time.ms_per_token_basis)}"),
    ]


def _basis(estimate: Estimate, basis: Basis) -> str:
    if basis == "derived":
        return "[derived, not measured]"
    of_model = estimate.model.name in estimate.profile.models
    return f"[from measurements of the device{'' if of_model else ', none of them of this model'}]"
