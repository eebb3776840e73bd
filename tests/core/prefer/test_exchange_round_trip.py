"""An exported example is imported as the same example, or its export is refused."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentpref.errors import ExchangeError
from agentpref.home import Home
from agentpref.prefer.examples import ExampleSet, example_id_of, read_examples
from agentpref.prefer.exchange import Exported, export_file, import_file, record_of
from agentpref.prefer.formats import llamafactory, normalized
from agentpref.record.database import connect
from agentpref.record.messages import canonical, prompt_of
from agentpref.record.store import Store
from agentpref.types import Completion, Example

pytestmark = pytest.mark.slow

Strategy: TypeAlias = st.SearchStrategy[Any]


def rarely(some: Strategy, others: Strategy) -> Strategy:
    return st.integers(0, 9).flatmap(lambda number: others if number else some)


words = st.text(st.characters(codec="utf-8"), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**64 - 1) | finite | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": words})
    | st.just({"type": "image_url", "image_url": {"url": "sky.png"}}),
    max_size=2,
)
contents = rarely(parts, words)
more = st.fixed_dictionaries(
    {}, optional={"name": words | st.none(), "refusal": st.none(), "extra": json_values}
)


def joined(*some: Strategy) -> Strategy:
    return st.tuples(*some).map(lambda made: {k: v for one in made for k, v in one.items()})


def said(*roles: str) -> Strategy:
    told = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": contents})
    return joined(told, more)


functions = st.fixed_dictionaries(
    {"name": words},
    optional={"arguments": rarely(words, st.sampled_from(['{"of":"sky"}', {"of": None}]))},
)
calls = st.lists(
    st.fixed_dictionaries({"function": functions}, optional={"id": words, "type": words}),
    min_size=1,
    max_size=2,
)
calling = joined(
    st.just({"role": "assistant"}),
    st.fixed_dictionaries(
        {}, optional={"content": rarely(contents, st.sampled_from([None, "", []]))}
    ),
    st.fixed_dictionaries({"tool_calls": calls}),
    more,
)
answers = said("assistant") | calling
asking = said("user", "tool")
prompts = st.tuples(
    st.lists(said("system", "developer"), max_size=1),
    st.lists(st.tuples(asking, answers), max_size=2),
    st.tuples(rarely(answers, asking)),
).map(lambda made: [*made[0], *(one for both in made[1] for one in both), *made[2]])
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": json_values}), max_size=2
)
tags = st.text("abé ", min_size=1, max_size=4)


@st.composite
def some_pairs(draw: st.DrawFn) -> list[Example]:
    """Pairs of prompts that differ from one another, as their answers do."""
    pairs = {}
    for _ in range(draw(st.integers(1, 3))):
        prompt = prompt_of(draw(prompts), draw(tools))
        chosen, rejected = draw(answers), draw(answers)
        assume(canonical(normalized(chosen)) != canonical(normalized(rejected)))
        completions = (Completion(chosen, 1.0), Completion(rejected, 0.0))
        example_id = example_id_of(prompt.id, completions)
        pairs[prompt.id] = Example(
            example_id, "default", 0.0, prompt, completions, "comparison", tag=draw(tags)
        )
    return [*pairs.values()]


def found(home: Home) -> ExampleSet:
    with closing(connect(home)) as connection:
        return read_examples(Store(connection), "default", held_out=0.2)


def content_of(example: Example, *, tagged: bool = True) -> tuple[object, ...]:
    """What a row of a format holds, with the ids that it gets.

    The order of keys is left out, as examples may share them, and so are null fields.
    """
    asked = [normalized(message) for message in example.prompt.messages]
    prompt = prompt_of(asked, example.prompt.tools)
    answers = [replace(one, message=normalized(one.message)) for one in example.completions]
    ids = prompt.id, example_id_of(prompt.id, answers)
    told = [(canonical(one.message), one.label) for one in answers]
    tools = [canonical(tool) for tool in example.prompt.tools]
    return ids, [*map(canonical, asked)], told, tools, tagged and example.tag


FORMATS = ["preference", "openai", "llamafactory"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30)
@given(pairs=some_pairs())
def test_exported_pairs_are_imported_as_the_same_pairs(
    tmp_path_factory: pytest.TempPathFactory, format: str, suffix: str, pairs: list[Example]
) -> None:
    folder = tmp_path_factory.mktemp("journey")
    path, home = folder / f"pairs{suffix}", Home.create(folder / "home")
    held = [pair for pair in pairs if holds(format, pair)]
    done = export_file(pairs, path, format=format, skip_bad=True)
    assert done == Exported(len(held), bad=len(pairs) - len(held))
    if held:
        import_file(home, path)
    tagged = format != "openai"
    arrived = [content_of(pair, tagged=tagged) for pair in found(home).pairs]
    assert arrived == [content_of(pair, tagged=tagged) for pair in held]


def holds(format: str, pair: Example) -> bool:
    if format != "llamafactory":
        return True
    try:
        llamafactory.write(record_of(pair))
    except ExchangeError:
        return False
    return True


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(max_examples=15)
@given(pairs=some_pairs(), label=st.sampled_from([0.0, 1.0]))
def test_exported_thumbs_are_imported_as_the_same_thumbs(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, pairs: list[Example], label: float
) -> None:
    folder = tmp_path_factory.mktemp("journey")
    path, home = folder / f"thumbs{suffix}", Home.create(folder / "home")
    thumbs = []
    for pair in pairs:
        completions = (Completion(pair.completions[0].message, label),)
        example_id = example_id_of(pair.prompt.id, completions)
        thumbs.append(replace(pair, example_id=example_id, completions=completions, origin="thumb"))
    assert export_file(thumbs, path, format="unpaired") == Exported(len(thumbs))
    import_file(home, path)
    arrived = [content_of(thumb) for thumb in found(home).thumbs]
    assert arrived == [content_of(thumb) for thumb in thumbs]
