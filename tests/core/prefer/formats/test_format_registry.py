"""The registry of formats: detection by the keys of a row, and formats of other packages."""

from __future__ import annotations

from contextlib import closing
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from agentpref import plugins
from agentpref.errors import ConfigError, ExchangeError
from agentpref.home import Home
from agentpref.prefer.examples import read_examples
from agentpref.prefer.exchange import export_file, import_file
from agentpref.prefer.formats import Fields, Format, PreferenceRecord, record_of_row
from agentpref.prefer.rowreader import RowReader
from agentpref.record.database import connect
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store

ANSWERS = {"chosen": "The sea is blue.", "rejected": "The sea is red."}
TURNS = {
    "chosen": {"from": "gpt", "value": "Blue."},
    "rejected": {"from": "gpt", "value": "Red."},
}
ROWS: dict[str, dict[str, Any]] = {
    "preference": {**ANSWERS, "prompt": "The sea?", "instruction": "not this", "input": "nor this"},
    "preference, prompt implied": ANSWERS,
    "llamafactory": {**TURNS, "conversations": [{"from": "human", "value": "The sea?"}]},
    "llamafactory, alpaca": {**ANSWERS, "instruction": "The sea?"},
    "openai": {
        "input": {"messages": [{"role": "user", "content": "The sea?"}]},
        "preferred_output": "Blue.",
        "non_preferred_output": "Red.",
    },
    "unpaired": {"prompt": "The sea?", "completion": "Blue.", "label": True},
}


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS)
def test_the_keys_of_a_row_tell_its_format(name: str, row: dict[str, Any]) -> None:
    asked = "The sea is" if "implied" in name else "The sea?"
    record = RowReader().read(row)
    assert record == RowReader(name.split(",")[0]).read(row)
    assert record.prompt.messages[-1]["content"] == asked


def test_null_columns_do_not_count_for_the_detection() -> None:
    row = {**ROWS["openai"], "chosen": None, "rejected": None, "conversations": None}
    assert RowReader().read(row) == RowReader().read(ROWS["openai"])


def test_a_named_format_is_used_whatever_the_keys_are() -> None:
    with pytest.raises(ExchangeError, match="lacks 'conversations'; write"):
        RowReader("llamafactory").read({**ANSWERS, "prompt": "The sea?"})


def test_an_unknown_format_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'openai'"):
        RowReader("openapi")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def test_a_row_that_is_nested_too_deeply_is_refused() -> None:
    sides = {side: [{"a": nested(50_000)}, {}] for side in ("chosen", "rejected")}
    with pytest.raises(ExchangeError, match="nested too deeply"):
        RowReader().read({"prompt": "The sea?", **sides})


@pytest.mark.parametrize("name", ["preference", "unpaired", "openai", "llamafactory"])
def test_every_format_of_ours_is_registered_and_knows_its_columns(name: str) -> None:
    assert name in plugins.names(plugins.FORMATS)
    format = plugins.load(plugins.FORMATS, name)
    assert {*format.columns} <= format.keys <= RowReader().keys
    record = RowReader(name).read(ROWS[name])
    assert len(record.completions) == format.completions
    assert RowReader().read(_as_json(format.write(record))) == record


@pytest.mark.parametrize("name", ["preference", "unpaired", "openai", "llamafactory"])
def test_a_record_that_a_format_cannot_hold_is_refused(name: str) -> None:
    message = {"role": "assistant", "content": "Blue."}
    group = PreferenceRecord(
        prompt_of([{"role": "user", "content": "The sea?"}]), (message,) * 3, (1, 0.5, 0)
    )
    with pytest.raises(ExchangeError, match="choose another format"):
        plugins.load(plugins.FORMATS, name).write(group)


def test_every_text_of_a_record_is_redacted_and_its_prompt_id_is_new() -> None:
    def record(name: str, tag: str) -> PreferenceRecord:
        tool = {"type": "function", "function": {"name": "ask", "description": f"asks {name}"}}
        asked = prompt_of([{"role": "user", "content": f"I am {name}."}], [tool])
        answers = tuple({"role": "assistant", "content": f"{x} {name}"} for x in ("Hi", "Who is"))
        return PreferenceRecord(asked, answers, (1, 0), tag)

    clean = record("ana@example.org", "x").redacted(
        lambda text: text.replace("ana@example.org", "[email]")
    )
    assert clean == record("[email]", "x")


def read_ranking(row: Fields) -> PreferenceRecord:
    answers = [{"role": "assistant", "content": text} for text in row["best_first"]]
    labels = tuple(float(-place) for place in range(len(answers)))
    return record_of_row(row, [{"role": "user", "content": row["question"]}], answers, labels)


def write_ranking(record: PreferenceRecord) -> dict[str, Any]:
    texts = [message["content"] for message in record.completions]
    return {"question": record.prompt.messages[-1]["content"], "best_first": texts}


RANKING = Format(
    shapes=(("question", "best_first"),),
    read=read_ranking,
    write=write_ranking,
    columns={"question": "text", "best_first": ["text"]},
)


@pytest.fixture
def ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that another package registers."""
    real = plugins.entry_points
    stranger = EntryPoint("ranking", f"{__name__}:RANKING", plugins.FORMATS)

    def entry_points(*, group: str) -> EntryPoints:
        return EntryPoints([*real(group=group), *([stranger] if group == stranger.group else [])])

    monkeypatch.setattr(plugins, "entry_points", entry_points)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.usefixtures("ranking")
def test_a_format_of_another_package_is_detected_read_and_written(
    tmp_path: Path, suffix: str
) -> None:
    rows, back = tmp_path / "rows.jsonl", tmp_path / f"back{suffix}"
    rows.write_text('{"question": "The sea?", "best_first": ["Blue.", "Grey.", "Red."]}')
    home, other = Home.create(tmp_path / "home"), Home.create(tmp_path / "other")
    assert import_file(home, rows).added == 1
    pairs = pairs_of(home)
    assert {tuple(c.message["content"] for c in p.completions) for p in pairs} == {
        ("Blue.", "Grey."), ("Blue.", "Red."), ("Grey.", "Red.")
    }  # fmt: skip
    assert export_file(pairs, back, format="ranking").rows == 3
    assert import_file(other, back, format="ranking").added == 3
    assert {p.example_id for p in pairs_of(other)} == {p.example_id for p in pairs}


def pairs_of(home: Home) -> Any:
    with closing(connect(home)) as connection:
        return read_examples(Store(connection), "default", held_out=0.2).pairs


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
