"""Answers as OpenAI's chat completions: whole, or in chunks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from ..request import Logprobs, Result, TokenEvent
from .answer import Answer

Spell = Callable[[int], str]
"""A token as it reads."""


def completion(answer: Answer, events: Iterable[TokenEvent], spell: Spell) -> dict[str, Any]:
    """The whole answer, of all its ``events``."""
    events = list(events)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(each.text for each in events), "refusal": None},
        "logprobs": _logprobs(events, spell) if answer.asked.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    document = {**_head(answer, "chat.completion"), "choices": [choice], "usage": usage(answer)}
    return {**document, **_beside(answer)}


def opening(answer: Answer) -> dict[str, Any]:
    """The first chunk."""
    return _chunk(answer, {"role": "assistant", "content": ""})


def piece(answer: Answer, event: TokenEvent, spell: Spell) -> dict[str, Any] | None:
    """The chunk of a token; None where there is nothing to say of it yet."""
    if not event.text and event.logprobs is None:
        return None
    return _chunk(answer, {"content": event.text}, logprobs=_logprobs([event], spell) if event.logprobs else None)


def closing(answer: Answer) -> list[dict[str, Any]]:
    """The chunks after the last token: why it ends, and the usage where it was asked for."""
    end = {**_chunk(answer, {}, reason=answer.finish_reason), **_beside(answer)}
    options = answer.asked.stream_options
    if options is None or not options.include_usage:
        return [end]
    return [end, {**_head(answer, "chat.completion.chunk"), "choices": [], "usage": usage(answer)}]


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens, those among them whose rows were there already."""
    result, prompt = answer.result, len(answer.handle.request.prompt)
    made = result.usage.completion_tokens if result else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def sent_event(document: dict[str, Any]) -> bytes:
    """A document as a server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": answer.number,
        "object": kind,
        "created": answer.created,
        "model": answer.asked.model,
        "service_tier": None,
        "system_fingerprint": None,
    }


def _chunk(
    answer: Answer, delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return {**_head(answer, "chat.completion.chunk"), "choices": [choice]}


def _beside(answer: Answer) -> dict[str, Any]:
    """What no other service has: times as llama.cpp's server tells them and, where it was asked for, how the answer was
    computed."""
    result = answer.result
    if result is None:
        return {}
    own = {"avl_edge": _explanation(answer, result)} if answer.asked.own.explain else {}
    return {"timings": _timings(answer, result), **own}


def _timings(answer: Answer, result: Result) -> dict[str, Any]:
    times, made = result.timings, result.usage.completion_tokens
    fresh = result.usage.prompt_tokens - answer.cached_tokens
    return {
        "cache_n": answer.cached_tokens,
        "prompt_n": fresh,
        "prompt_ms": round(answer.prompt_ms, 3),
        "predicted_n": made,
        "predicted_ms": round(times.decode_ms_per_token * max(made - 1, 0), 3),
        "predicted_per_second": round(times.tokens_per_s, 3),
        "first_token_ms": round(times.ttft_ms, 3),
    }


def _explanation(answer: Answer, result: Result) -> dict[str, Any]:
    kv = result.kv
    return {
        "method": result.method,
        "settings": result.settings,
        "formats": result.formats,
        "image_tokens": result.usage.image_tokens,
        "image_session": answer.prepared.session is not None,
        "bytes_full": kv.bytes_full,
        "bytes_stored": kv.bytes_stored,
        "bytes_peak": kv.bytes_peak,
        "bytes_shared": kv.bytes_shared,
        "bytes_budget": kv.bytes_budget,
        "rows_read_fraction": kv.rows_read_fraction,
        "layers": list(kv.layers),
        "seed": result.seed,
        "cut_by_deadline": answer.is_late,
    }


def _logprobs(events: Iterable[TokenEvent], spell: Spell) -> dict[str, Any]:
    content = [_logprob(each.logprobs, spell) for each in events if each.logprobs]
    return {"content": content, "refusal": None}


def _logprob(logprobs: Logprobs, spell: Spell) -> dict[str, Any]:
    top = [_named(each.token_id, each.logprob, spell) for each in logprobs.top]
    return {**_named(logprobs.token_id, logprobs.logprob, spell), "top_logprobs": top}


def _named(token_id: int, logprob: float, spell: Spell) -> dict[str, Any]:
    text = spell(token_id)
    # Part of a character has bytes of its own, which a text cannot show.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
