"""Text from tokens that are single bytes, so that a token may be part of a character."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from agentpref.models.text_stream import TextStream

words = st.text(alphabet="ab é🌊", max_size=30)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3)


def decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def feed(text: str, stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode, stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@given(words)
def test_the_pieces_join_to_the_text(text: str) -> None:
    pieces, stream = feed(text)
    assert "".join(pieces) == text == stream.text
    assert not stream.stopped


@given(words)
def test_the_text_is_the_same_when_all_tokens_are_pushed_at_once(text: str) -> None:
    stream = TextStream(decode)
    assert stream.push(*text.encode()) + stream.finish() == text


@given(words, stops)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    cuts = [position for s in stop if (position := text.find(s)) >= 0]
    pieces, stream = feed(text, stop)
    # A longer stop string may begin earlier than the shorter one that is complete first.
    complete = [position + len(s) for s in stop if (position := text.find(s)) >= 0]
    seen = text[: min(complete)] if complete else text
    cut = min((position for s in stop if (position := seen.find(s)) >= 0), default=len(text))
    assert "".join(pieces) == text[:cut] == stream.text
    assert stream.stopped == bool(cuts)


def test_a_character_is_returned_with_its_last_byte() -> None:
    pieces, _ = feed("aé")
    assert pieces == ["a", "", "é", ""]


def test_the_possible_start_of_a_stop_string_is_withheld() -> None:
    pieces, _ = feed("a##b", stop=("##!",))
    assert pieces == ["a", "", "", "##b", ""]


def test_an_answer_that_ends_inside_a_character_ends_in_a_replacement_character() -> None:
    stream = TextStream(decode)
    assert stream.push(0xC3) == ""
    assert stream.finish() == "\ufffd"


def test_a_long_answer_is_decoded_in_short_windows() -> None:
    longest = 0

    def watched(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    stream = TextStream(watched)
    for token in b"x" * 500:
        stream.push(token)
    assert longest <= 4
