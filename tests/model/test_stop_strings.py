"""Stop strings: what is given out of any text, in any pieces and tokens, is what stands before the first of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from avl_edge.model.prompt import Detokenizer
from avl_edge.model.stop_strings import StopMatcher, TextStream
from tests.equipment.small_tokenizers import byte_level, llama, llama_legacy, unigram

TOKENIZERS = {"byte-level": byte_level, "llama": llama, "llama, legacy": llama_legacy, "unigram": unigram}
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=4), max_size=8)


def _first(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first stop string begins, reading character by character: the longest of those that end first."""
    for end in range(len(text) + 1):
        for begin in range(end):
            if text[begin:end] in stops:
                return begin, text[begin:end]
    return None


@settings(max_examples=500)
@given(pieces=PIECES, stops=STOPS)
@example(pieces=["abba"], stops=["bba", "bb"])  # one inside another, in one piece
@example(pieces=["a", "b", "a"], stops=["abb", "ba"])  # what was withheld for one is part of another
@example(pieces=["aab", "b"], stops=["abb", "b"])
def test_what_comes_out_is_the_text_before_the_first_one(pieces: list[str], stops: list[str]) -> None:
    matcher, text, found = StopMatcher(stops), "", ""
    for piece in pieces:
        text += piece
        found += matcher.push(piece)
        first = _first(text, stops)
        assert matcher.matched == (first[1] if first else None)
        if first:
            assert found == text[: first[0]]
            assert matcher.push("more") == matcher.finish() == ""
            return
        assert text.startswith(found)
    assert found + matcher.finish() == text
    assert matcher.finish() == ""


@settings(max_examples=500)
@given(pieces=PIECES, stops=STOPS)
def test_no_more_is_withheld_than_may_become_one(pieces: list[str], stops: list[str]) -> None:
    """At any time there is a text that could follow with which the first stop string begins where the rest does."""
    matcher, text, given_out = StopMatcher(stops), "", 0
    for piece in pieces:
        text += piece
        given_out += len(matcher.push(piece))
        if matcher.matched is not None:
            return
        if given_out < len(text):
            follows = [each[size:] for each in stops for size in range(1, len(each))]
            begins = [first[0] for rest in follows if (first := _first(text + rest, stops))]
            assert given_out in begins


@given(pieces=PIECES, stops=STOPS, following=st.text("abc", max_size=5))
def test_asking_for_a_match_changes_nothing(pieces: list[str], stops: list[str], following: str) -> None:
    matcher, asked = StopMatcher(stops), StopMatcher(stops)
    for number, piece in enumerate(pieces):
        if asked.matched is None:
            before = "".join(pieces[:number])
            assert asked.would_match(following) == (_first(before + following, stops) is not None)
        assert asked.push(piece) == matcher.push(piece)
    assert (asked.matched, asked.finish()) == (matcher.matched, matcher.finish())


def test_long_repetitive_stop_strings_are_quick() -> None:
    stops = ["a" * length + "b" for length in range(240, 256)]
    matcher = StopMatcher(stops)
    assert len("".join(matcher.push("a") for _ in range(1000))) == 1000 - 255
    assert matcher.push("b") == ""
    assert matcher.matched == stops[-1]


def _stream(tokenizer: Tokenizer, *stops: str) -> TextStream:
    special = [i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special]
    return TextStream(Detokenizer(tokenizer, special), stops)


def _run(stream: TextStream, ids: Sequence[int]) -> tuple[str, int]:
    """The text, and how many tokens it took."""
    text = ""
    for used, token in enumerate(ids, start=1):
        text += stream.push(token)
        if stream.stop_string is not None:
            return text, used
    return text + stream.finish(), len(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_tokens(kind: str, data: st.DataObject) -> None:
    """The text ends before the first stop string, with the token that completes it: none is in the text before."""
    tokenizer = TOKENIZERS[kind]()
    any_id = st.integers(0, tokenizer.get_vocab_size() - 1)
    some_bytes = st.integers(3, 258)  # where the llama tokenizers have their byte tokens
    ids = data.draw(st.lists(any_id | some_bytes, min_size=1, max_size=20))
    whole = tokenizer.decode(ids) or "a"
    spans = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 4)).map(lambda span: whole[span[0] : sum(span)])
    stops = data.draw(st.lists(spans | st.sampled_from(["a", "the", "\n", " c"]), min_size=1, max_size=3))
    stream = _stream(tokenizer, *stops)
    text, used = _run(stream, ids)
    first = _first(tokenizer.decode(ids[:used]), stops)
    assert stream.stop_string == (first[1] if first else None)
    assert text == tokenizer.decode(ids[:used])[: first[0] if first else None]
    assert stream.finish() == ""
    readable = (tokenizer.decode(ids[:before]) for before in range(used))
    assert not any(_first(before, stops) for before in readable if "\ufffd" not in before)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=st.lists(st.integers(3, 110), max_size=20))
def test_without_stop_strings_the_text_is_the_detokenizers(kind: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[kind]()
    stream = _stream(tokenizer)
    assert _run(stream, ids) == (tokenizer.decode(ids), len(ids))
    assert stream.stop_string is None


def test_a_newline_of_byte_tokens_ends_an_answer_at_once() -> None:
    """A Llama model has no other newline, and its byte tokens are held back until their run ends."""
    tokenizer = llama()
    ids = tokenizer.encode("a cat", add_special_tokens=False).ids
    newline, latin = tokenizer.token_to_id("<0x0A>"), tokenizer.token_to_id("<0xE9>")
    assert _run(_stream(tokenizer, "\n"), [*ids, newline, newline, *ids]) == ("a cat", len(ids) + 1)
    assert _run(_stream(tokenizer, "\n\n"), [*ids, newline, newline, *ids]) == ("a cat", len(ids) + 2)
    # Half a character, and then a newline: the run is invalid, and all of it is replaced.
    assert _run(_stream(tokenizer, "\n"), [*ids, latin, newline]) == ("a cat\ufffd\ufffd", len(ids) + 2)


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_half_a_character_is_no_replacement_character(kind: str) -> None:
    """A stop string of it is found where the text really has one, not where an emoji is on its way."""
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode("a 😀 b", add_special_tokens=False).ids
    assert _run(_stream(tokenizer, "\ufffd"), ids) == ("a 😀 b", len(ids))
    stream = _stream(tokenizer, "\ufffd")
    half = next(ids[:end] for end in range(1, len(ids)) if "\ufffd" in tokenizer.decode(ids[:end]))
    text = "".join(map(stream.push, half)) + stream.finish()
    assert (text, stream.stop_string) == ("a ", "\ufffd"), "where the tokens end, it is one"
