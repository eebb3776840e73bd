"""Whatever an object of feedback holds, it is read, or refused by the name of a field."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.prefer.formats.webui_rating import rating_of

QUESTION = {
    "id": "q",
    "parentId": None,
    "childrenIds": ["a", "b"],
    "role": "user",
    "content": "Is the shop open on Sundays?",
}
ANSWERS = {
    name: {"id": name, "parentId": "q", "role": "assistant", "content": text, "timestamp": 1}
    for name, text in (("a", "No."), ("b", "That depends."))
}
RATING = {
    "id": "f",
    "user_id": "u",
    "type": "rating",
    "data": {"rating": 1, "model_id": "small", "sibling_model_ids": ["large"], "comment": "yes"},
    "meta": {"chat_id": "c", "message_id": "a"},
    "snapshot": {"chat": {"chat": {"history": {"messages": {"q": QUESTION, **ANSWERS}}}}},
    "created_at": 2,
    "updated_at": 3,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of everything in a nest of mappings."""
    inner = value.items() if isinstance(value, dict) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


@given(place=st.sampled_from(places(RATING)[1:]), value=JSON)
def test_any_value_in_any_place_is_read_or_refused(place: tuple[str, ...], value: Any) -> None:
    feedback: Any = copy.deepcopy(RATING)
    within = feedback
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    try:
        rating = rating_of(feedback)
    except ExchangeError:
        return
    assert rating.prompt or rating.prompt_left_out
    assert all(winner in ("a", "b", "tie") for _, winner in rating.comparisons)


def test_a_rating_is_read_whole() -> None:
    rating = rating_of(RATING)
    assert rating.prompt == ({"role": "user", "content": "Is the shop open on Sundays?"},)
    assert (rating.answer.text, rating.liked, rating.comment) == ("No.", True, "yes")
    assert [(other.text, winner) for other, winner in rating.comparisons] == [
        ("That depends.", "a")
    ]
    assert rating.voter == "open-webui f"


def test_a_chat_whose_messages_go_round_in_circles_has_no_prompt() -> None:
    feedback: Any = copy.deepcopy(RATING)
    feedback["snapshot"]["chat"]["chat"]["history"]["messages"]["q"]["parentId"] = "q"
    assert rating_of(feedback).prompt == ()
