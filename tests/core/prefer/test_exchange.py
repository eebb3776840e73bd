"""Import and export of files: what is stored, what is refused, and what comes back."""

from __future__ import annotations

import io
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentpref.errors import ConfigError, ExchangeError, NotAHome, RedactionFailed
from agentpref.home import Home
from agentpref.prefer import jsonrows, rowfiles
from agentpref.prefer.examples import ExampleSet, example_id_of, read_examples
from agentpref.prefer.exchange import (
    Exported,
    Imported,
    export_file,
    file_examples,
    import_file,
)
from agentpref.record.database import connect
from agentpref.record.ingest.pseudonyms import Pseudonyms
from agentpref.record.integrity import examine
from agentpref.record.judges import Judges
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store
from agentpref.types import Completion, Example, Prompt

PAIRED = [
    {"prompt": "What colour is the sky?", "chosen": "Blue.", "rejected": "Green."},
    {"prompt": "And the sea?", "chosen": "Green.", "rejected": "Red.", "tag": "sea"},
]
UNPAIRED = [
    {"prompt": "And the sun?", "completion": "Yellow.", "label": True},
    {"prompt": "And the moon?", "completion": "Purple.", "label": False},
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preferences.jsonl"


def write(file: Path, *rows: Any) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def found(home: Home, namespace: str = "default") -> ExampleSet:
    with closing(connect(home)) as connection:
        return read_examples(Store(connection), namespace, held_out=0.2)


def counts(imported: Imported) -> tuple[int, int, int]:
    return imported.added, imported.known, imported.bad


def preferences(found: ExampleSet) -> dict[str, tuple[str, ...]]:
    return {
        pair.prompt.messages[-1]["content"]: tuple(c.message["content"] for c in pair.completions)
        for pair in found.pairs
    }


class TestImport:
    def test_preferences_become_pairs_and_labels_thumbs(self, home: Home, file: Path) -> None:
        write(file, *PAIRED, *UNPAIRED)
        assert counts(import_file(home, file)) == (4, 0, 0)
        result = found(home)
        assert preferences(result) == {
            "What colour is the sky?": ("Blue.", "Green."),
            "And the sea?": ("Green.", "Red."),
        }
        assert [(p.origin, p.tag) for p in result.pairs] == [
            ("comparison", "untagged"),
            ("comparison", "sea"),
        ]
        assert [(c.message["content"], c.label) for t in result.thumbs for c in t.completions] == [
            ("Yellow.", 1.0),
            ("Purple.", 0.0),
        ]
        assert result.left_out == {}

    def test_a_file_that_is_imported_twice_adds_nothing(self, home: Home, file: Path) -> None:
        write(file, *PAIRED, *UNPAIRED, PAIRED[0])
        assert counts(import_file(home, file)) == (4, 1, 0)
        before = found(home)
        assert counts(import_file(home, file)) == (0, 5, 0)
        assert found(home) == before

    def test_columns_that_were_not_read_are_named_and_counted(self, home: Home, file: Path) -> None:
        extra = {"score": 0.5, "note": None, "chosen_rating": float("nan"), "tag": ["x"]}
        turned = {"from": "gpt", "value": "Blue.", "weight": 0}
        llama = {
            "conversations": [{"from": "human", "value": "Sky?", "id": 7}],
            "chosen": turned,
            "rejected": {**turned, "value": "Red."},
        }
        asked = {"messages": [{"role": "user", "content": "Sea?"}], "user": "u"}
        openai = {
            "input": asked,
            "preferred_output": [{"role": "assistant", "content": "Blue."}],
            "non_preferred_output": [{"role": "assistant", "content": "Red."}],
        }
        write(file, PAIRED[0] | extra, PAIRED[1] | {"score": 1}, {**UNPAIRED[0], "chosen": "x"})
        assert import_file(home, file).ignored == {"chosen": 1, "score": 2, "tag": 1}
        write(file, llama, openai)
        assert import_file(home, file).ignored == {
            "chosen.weight": 1, "conversations.id": 1, "input.user": 1, "rejected.weight": 1
        }  # fmt: skip

    def test_each_namespace_has_rows_of_its_own(self, home: Home, file: Path) -> None:
        write(file, *PAIRED)
        import_file(home, file, namespace="a")
        assert counts(import_file(home, file, namespace="b")) == (2, 0, 0)
        assert len(found(home, "a").pairs) == len(found(home, "b").pairs) == 2

    def test_source_user_and_tag_of_the_import_are_stored(self, home: Home, file: Path) -> None:
        write(file, *PAIRED)
        import_file(home, file, source="model", user_id="gpt", tag="colours")
        assert found(home).left_out == {"uncalibrated_judge": 2}
        with closing(connect(home)) as connection:
            judges = Judges(connection)
            judges.calibrate("default", judges.voter_of("gpt"), {"colours": 0.2}, {})
        assert {(p.origin, p.tag) for p in found(home).pairs} == {("judge", "colours")}

    def test_a_known_row_keeps_its_first_tag(self, home: Home, file: Path) -> None:
        write(file, *PAIRED)
        import_file(home, file, tag="colours")
        before = found(home)
        assert counts(import_file(home, file, tag="other")) == (0, 2, 0)
        assert counts(import_file(home, file)) == (0, 2, 0)
        assert found(home) == before
        assert {p.tag for p in before.pairs} == {"colours"}

    def test_the_user_is_stored_as_the_same_hash_as_in_the_log(
        self, home: Home, file: Path
    ) -> None:
        write(file, PAIRED[0], UNPAIRED[0])
        import_file(home, file, user_id="ana@example.org")
        assert counts(import_file(home, file, user_id="ana@example.org")) == (0, 2, 0)
        name = Pseudonyms.of(home).name("ana@example.org")
        with closing(connect(home)) as connection:
            store = Store(connection)
            said = [*store.comparisons("default"), *store.feedback("default")]
        assert [one.user_id for one in said] == [name, name]
        assert b"ana@" not in home.database.read_bytes()

    def test_texts_are_redacted_before_anything_is_stored(self, home: Home, file: Path) -> None:
        write(file, {"prompt": "I am Ana.", "chosen": "Hi Ana!", "rejected": "Who is Ana?"})
        redact = partial(re.sub, "Ana", "[name]")
        assert counts(import_file(home, file, redact=redact)) == (1, 0, 0)
        assert counts(import_file(home, file, redact=redact)) == (0, 1, 0)
        assert preferences(found(home)) == {"I am [name].": ("Hi [name]!", "Who is [name]?")}
        stored = b"".join(path.read_bytes() for path in home.path.iterdir() if path.is_file())
        assert b"Ana" not in stored

    def test_a_redaction_that_fails_stops_the_import_and_names_the_line(
        self, home: Home, file: Path
    ) -> None:
        write(file, PAIRED[0])
        with pytest.raises(RedactionFailed, match=f"{file}, line 1: ") as failed:
            import_file(home, file, redact=lambda text: text[99], skip_bad=True)
        assert "sky" not in str(failed.value)
        assert found(home) == ExampleSet()

    def test_a_person_and_a_judge_on_the_same_row_make_two_judgements(
        self, home: Home, file: Path
    ) -> None:
        write(file, *PAIRED)
        import_file(home, file)
        assert counts(import_file(home, file, source="model")) == (2, 0, 0)
        assert [len(p.provenance) for p in found(home).pairs] == [1, 1]
        assert found(home).left_out == {"uncalibrated_judge": 2}

    def test_a_later_line_supersedes_an_earlier_one(self, home: Home, file: Path) -> None:
        turned = {"prompt": "And the sea?", "chosen": "Red.", "rejected": "Green."}
        write(file, PAIRED[1], turned)
        import_file(home, file)
        assert preferences(found(home)) == {"And the sea?": ("Red.", "Green.")}

    def test_an_imported_home_passes_verify(self, home: Home, file: Path) -> None:
        write(file, *PAIRED, *UNPAIRED)
        import_file(home, file)
        with closing(connect(home)) as connection:
            assert examine(connection).problems == []

    def test_a_byte_order_mark_and_blank_lines_are_ignored(self, home: Home, file: Path) -> None:
        row = json.dumps(PAIRED[0]).encode()
        file.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row.replace(b"sky", b"sea"))
        assert counts(import_file(home, file)) == (2, 0, 0)

    @pytest.mark.parametrize("indent", [None, 2])
    def test_a_file_with_one_json_list_is_read(
        self, home: Home, file: Path, indent: int | None
    ) -> None:
        file.write_text("\ufeff \n" + json.dumps([*PAIRED, *UNPAIRED], indent=indent))
        done = import_file(home, file)
        assert counts(done) == (4, 0, 0)
        assert done.bytes_read == file.stat().st_size
        assert set(preferences(found(home))) == {"What colour is the sky?", "And the sea?"}

    def test_a_pipe_is_read_like_a_file(self, home: Home, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        text = "".join(json.dumps(row) + "\n" for row in PAIRED)
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        assert import_file(home, pipe) == Imported(2, 0, 0, len(text), 0)
        writer.join()

    def test_large_rows_make_small_batches(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rowfiles, "BATCH_BYTES", 1000)
        write(file, *({**PAIRED[0], "chosen": f"{n}" * 600} for n in range(5)))
        seen: list[Imported] = []
        import_file(home, file, on_progress=seen.append)
        assert [one.added for one in seen] == [2, 4, 5]

    def test_progress_is_reported_after_every_batch(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rowfiles, "BATCH_ROWS", 2)
        write(file, *({**PAIRED[0], "chosen": f"answer {n}"} for n in range(5)))
        seen: list[Imported] = []
        last = import_file(home, file, on_progress=seen.append)
        assert [one.added for one in seen] == [2, 4, 5]
        assert seen[-1] == last
        assert 0 < seen[0].bytes_read < last.bytes_read == last.bytes_total == file.stat().st_size


BAD_LINES = {
    b'{"prompt": "a", "chosen": "b"}': "lacks 'rejected'",
    b'["a", "b"]': "not a JSON object; write one JSON object on each line, or one list",
    b'{"prompt": "a", ': "it is not JSON",
    b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}': "byte 15 is not UTF-8 (0xe9)",
    b'{"prompt": "a", "completion": "b", "label": 3}': "'label' is 3; write true",
}


class TestBadFiles:
    @pytest.mark.parametrize(("line", "complaint"), BAD_LINES.items())
    def test_a_bad_line_is_named_with_its_cure(
        self, home: Home, file: Path, line: bytes, complaint: str
    ) -> None:
        file.write_bytes(json.dumps(PAIRED[0]).encode() + b"\n" + line + b"\n")
        with pytest.raises(ExchangeError) as refused:
            import_file(home, file)
        assert str(refused.value).startswith(f"{file}, line 2: ")
        assert complaint in str(refused.value)

    def test_bad_lines_are_counted_when_skipped(self, home: Home, file: Path) -> None:
        file.write_bytes(b"\n".join([*BAD_LINES, json.dumps(PAIRED[0]).encode()]))
        assert counts(import_file(home, file, skip_bad=True)) == (1, 0, 5)

    def test_a_gigantic_line_is_refused_and_can_be_skipped(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jsonrows, "MAX_ROW_BYTES", 200)
        write(file, PAIRED[0], {**PAIRED[0], "chosen": "x" * 900}, PAIRED[1])
        assert counts(import_file(home, file, skip_bad=True)) == (2, 0, 1)
        with pytest.raises(ExchangeError, match="line 2: it is longer than 200 bytes"):
            import_file(home, file)

    def test_a_bad_line_undoes_only_its_own_batch(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rowfiles, "BATCH_ROWS", 2)
        rows = [{**PAIRED[0], "chosen": f"answer {n}"} for n in range(3)]
        write(file, *rows, {"oops": 1})
        with pytest.raises(ExchangeError, match="line 4"):
            import_file(home, file)
        assert len(found(home).pairs) == 2

    def test_a_bad_row_of_a_list_is_named_and_can_be_skipped(self, home: Home, file: Path) -> None:
        file.write_text(json.dumps([PAIRED[0], {"prompt": "a"}, 7, PAIRED[1]]))
        with pytest.raises(ExchangeError, match=f"{file}, row 2: the row has the keys 'prompt'"):
            import_file(home, file)
        assert counts(import_file(home, file, skip_bad=True)) == (2, 0, 2)

    @pytest.mark.parametrize("skip_bad", [False, True])
    @pytest.mark.parametrize(
        ("rest", "complaint"),
        [
            (',{"prompt": ]}, 7]', "row 3 on it cannot be read as JSON .parse error: unallowed"),
            (', {"prompt": "x', "row 3 on it cannot be read as JSON .parse error: premature EOF"),
            ("] x", "row 3 on it cannot be read as JSON .parse error: trailing garbage"),
        ],
    )
    def test_a_list_that_breaks_off_ends_the_import_after_its_whole_batches(
        self,
        home: Home,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        rest: str,
        complaint: str,
        skip_bad: bool,
    ) -> None:
        monkeypatch.setattr(rowfiles, "BATCH_ROWS", 2)
        file.write_text(json.dumps(PAIRED)[:-1] + rest)
        with pytest.raises(ExchangeError, match=f"^{file}: from {complaint}"):
            import_file(home, file, skip_bad=skip_bad)
        assert len(found(home).pairs) == 2

    @pytest.mark.parametrize(
        ("start", "unpack"),
        [(b"PK\x03\x04", "unzip"), (b"\x28\xb5\x2f\xfd", "zstd -d"), (b"BZh9", "bunzip2")],
    )
    def test_a_compressed_file_is_refused_with_the_command_that_unpacks_it(
        self, home: Home, file: Path, start: bytes, unpack: str
    ) -> None:
        file.write_bytes(start + b"more")
        with pytest.raises(ExchangeError, match=f"compressed; unpack it first, with `{unpack}`"):
            import_file(home, file, skip_bad=True)

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"[]"])
    def test_a_file_without_rows_is_refused(self, home: Home, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        with pytest.raises(ExchangeError, match="holds no rows; name a file with a JSON object"):
            import_file(home, file)

    def test_a_file_that_cannot_be_opened_is_named(self, home: Home, tmp_path: Path) -> None:
        for path in (tmp_path / "missing.jsonl", tmp_path):
            with pytest.raises(ExchangeError, match=f"{path} cannot be read"):
                import_file(home, path)

    def test_a_missing_home_is_reported_before_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(NotAHome):
            import_file(Home(tmp_path), tmp_path / "missing.jsonl", user_id="ana")
        assert [*tmp_path.iterdir()] == [], "and no key is left there"

    def test_unknown_arguments_are_refused(self, home: Home, file: Path) -> None:
        with pytest.raises(ExchangeError, match="source is 'robot'; pass one of 'human'"):
            import_file(home, file, source="robot")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"'csv' in agentpref\.formats; known: .*preference"):
            import_file(home, file, format="csv")
        for name in ("tag", "namespace"):
            for text in ("", "a\nb", "\udcff"):
                with pytest.raises(ExchangeError, match=f"{name} is .*; pass printable text"):
                    import_file(home, file, **{name: text})

    def test_a_file_name_that_is_not_utf8_is_stored_with_replacements(
        self, home: Home, tmp_path: Path
    ) -> None:
        path = tmp_path / "caf\udce9.jsonl"
        write(path, PAIRED[0])
        import_file(home, path)
        with closing(connect(home)) as connection:
            [run, _] = Store(connection).runs("default")
        assert run.metadata == {"imported_from": "caf\ufffd.jsonl"}


def example(prompt: Prompt, *completions: Completion) -> Example:
    example_id = example_id_of(prompt.id, completions)
    return Example(example_id, "default", 0.0, prompt, completions, "comparison")


BLUE, GREEN = (
    Completion({"role": "assistant", "content": text}, label)
    for text, label in (("Blue.", 1.0), ("Green.", 0.0))
)
SKY = example(prompt_of([{"role": "user", "content": "What colour is the sky?"}]), BLUE, GREEN)


class TestExport:
    def test_an_export_replaces_the_file(self, file: Path) -> None:
        file.write_text("what was there before")
        assert export_file([SKY], file) == Exported(1)
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            {
                "prompt": [{"role": "user", "content": "What colour is the sky?"}],
                "chosen": [{"role": "assistant", "content": "Blue."}],
                "rejected": [{"role": "assistant", "content": "Green."}],
                "tag": "untagged",
            }
        ]

    def test_an_export_that_fails_leaves_the_old_file_and_no_other(self, file: Path) -> None:
        def failing() -> Iterator[Example]:
            yield SKY
            raise KeyError("the source fails")

        file.write_text("what was there before")
        with pytest.raises(KeyError):
            export_file(failing(), file)
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        assert file.read_text() == "what was there before"

    def test_a_path_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "no folder" / "out.jsonl"
        with pytest.raises(ExchangeError, match=r"out\.jsonl cannot be written"):
            export_file([SKY], path)

    def test_a_stream_is_written_to(self) -> None:
        stream = io.BytesIO()
        assert export_file([example(SKY.prompt, BLUE)], stream, format="unpaired") == Exported(1)
        row = json.loads(stream.getvalue())
        assert (row["completion"], row["label"]) == ([BLUE.message], True)

    def test_an_example_that_the_format_cannot_hold_is_named_or_skipped(self, file: Path) -> None:
        prompt = prompt_of([*SKY.prompt.messages, *SKY.prompt.messages])
        twice = replace(SKY, prompt=prompt, example_id="twice")
        file.write_text("what was there before")
        with pytest.raises(ExchangeError, match=r"^row 2 \(example twice\): message 1 is from"):
            export_file([SKY, twice], file, format="llamafactory")
        assert file.read_text() == "what was there before"
        done = export_file([SKY, twice], file, format="llamafactory", skip_bad=True)
        assert done == Exported(1, bad=1)
        assert len(file.read_text().splitlines()) == 1

    def test_an_unknown_format_is_refused(self, file: Path) -> None:
        with pytest.raises(ConfigError, match="did you mean 'preference'"):
            export_file([SKY], file, format="preferences")


class TestTables:
    """What ``datasets`` and TRL make of our files, and we of theirs."""

    @pytest.fixture
    def datasets(self) -> Any:
        return pytest.importorskip("datasets")

    @pytest.fixture
    def table(self, tmp_path: Path) -> Path:
        return tmp_path / "preferences.parquet"

    def test_trl_reads_an_export_and_a_table_of_it_comes_back(
        self, home: Home, file: Path, table: Path, datasets: Any
    ) -> None:
        data_utils = pytest.importorskip("trl.data_utils")
        tools = [{"type": "function", "function": {"name": "look_up"}}]
        with_tools = example(prompt_of(SKY.prompt.messages, tools), BLUE, GREEN)
        cache = str(table.parent / "cache")
        export_file([SKY, with_tools], file)
        export_file([SKY, with_tools], table)
        from_lines = datasets.Dataset.from_json(str(file), cache_dir=cache)
        from_table = datasets.Dataset.from_parquet(str(table), cache_dir=cache)
        for rows in (from_lines, from_table):
            assert all(data_utils.is_conversational(row) for row in rows)
            assert all(data_utils.maybe_extract_prompt(row) == row for row in rows)
        from_lines.to_parquet(str(table))
        import_file(home, table)
        assert {p.example_id for p in found(home).pairs} == {
            SKY.example_id,
            with_tools.example_id,
        }

    @pytest.mark.parametrize("mixed", [None, "use_json"])
    def test_nulls_that_fill_up_structs_are_not_imported(
        self, home: Home, table: Path, datasets: Any, mixed: str | None
    ) -> None:
        def tool(name: str) -> dict[str, Any]:
            parameters = {"type": "object", "properties": {name: {"type": "string"}}}
            return {"type": "function", "function": {"name": name, "parameters": parameters}}

        function = {"name": "a", "arguments": "{}"}
        call = {"id": "1", "type": "function", "function": function}
        called = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "x", "tool_call_id": "1"},
        ]
        answers = {
            side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")
        }
        rows = [
            {"prompt": called, "tools": [tool("a")], **answers},
            {"prompt": called[:1], "tools": [tool("b"), tool("c")], **answers},
        ]
        rows_of_table = datasets.Dataset.from_list(rows, on_mixed_types=mixed)
        rows_of_table.to_parquet(str(table))
        assert counts(import_file(home, table)) == (2, 0, 0)
        assert [p.prompt for p in found(home).pairs] == [
            prompt_of(called, [tool("a")]),
            prompt_of(called[:1], [tool("b"), tool("c")]),
        ]

    def test_columns_of_a_table_that_were_not_read_are_counted(
        self, home: Home, table: Path
    ) -> None:
        pa, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
        columns = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}
        extra = {"score": [0.5, None], "input": ["x", None]}
        parquet.write_table(pa.table(columns | extra), table)
        assert import_file(home, table).ignored == {"input": 1, "score": 1}

    def test_numbers_of_a_table_are_labels(self, home: Home, table: Path) -> None:
        pa, parquet = map(pytest.importorskip, ("pyarrow", "pyarrow.parquet"))
        labels = pa.array([Decimal("1.00"), Decimal("0.00")])
        columns = {"prompt": ["a", "b"], "completion": ["c", "d"], "label": labels}
        parquet.write_table(pa.table(columns), table)
        assert counts(import_file(home, table)) == (2, 0, 0)
        assert [t.completions[0].label for t in found(home).thumbs] == [1.0, 0.0]

    def test_a_row_of_a_table_is_named_and_can_be_skipped(
        self, home: Home, table: Path, datasets: Any
    ) -> None:
        rows = [PAIRED[0], {**PAIRED[1], "chosen": None, "tag": None}, PAIRED[1]]
        datasets.Dataset.from_list(rows).to_parquet(str(table))
        with pytest.raises(ExchangeError, match=f"{table}, row 2: .* lacks 'chosen'"):
            import_file(home, table)
        done = import_file(home, table, skip_bad=True)
        assert counts(done) == (2, 0, 1)
        assert done.bytes_read == done.bytes_total == table.stat().st_size

    def test_a_broken_table_is_named(self, home: Home, table: Path) -> None:
        table.write_bytes(b"PAR1 and no more")
        with pytest.raises(ExchangeError, match=f"^{table}: it cannot be read as Parquet"):
            import_file(home, table, skip_bad=True)


def test_imported_arguments_of_the_chat_template_are_those_of_the_prompt(tmp_path: Path) -> None:
    home, file = Home.create(tmp_path / "home"), tmp_path / "rows.jsonl"
    row = {"prompt": "The sky?", "chosen": "Blue.", "rejected": "Green."}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, {**row, **off})))
    assert import_file(home, file).added == 2
    with closing(connect(home)) as connection:
        found = read_examples(Store(connection), "default", held_out=0.5)
    arguments = [pair.prompt.chat_template_kwargs for pair in found.pairs]
    assert sorted(arguments, key=len) == [{}, off["chat_template_kwargs"]]
    assert len({pair.prompt.id for pair in found.pairs}) == 2


def test_a_file_makes_the_examples_that_its_import_would_make(home: Home, file: Path) -> None:
    opposed = [
        {"prompt": "Which one?", "completion": text, "label": text == "This."}
        for text in ("This.", "That.")
    ]
    asked = {**PAIRED[0], "chat_template_kwargs": {"enable_thinking": False}}
    changed = {**PAIRED[1], "chosen": PAIRED[1]["rejected"], "rejected": PAIRED[1]["chosen"]}
    write(file, *PAIRED, *UNPAIRED, *opposed, asked, changed, PAIRED[0])
    read = file_examples(file)
    import_file(home, file)
    imported = found(home)
    facts = ("example_id", "tag", "origin", "lone", "noise")

    def told(examples: ExampleSet) -> set[tuple[Any, ...]]:
        return {tuple(getattr(one, name) for name in facts) for one in examples.examples}

    assert told(read) == told(imported)
    assert read.left_out == imported.left_out
    assert {one.prompt.id for one in read.examples} == {one.prompt.id for one in imported.examples}
    assert all(one.held_out for one in read.examples)


def test_a_file_that_is_only_read_names_its_bad_row(file: Path) -> None:
    write(file, PAIRED[0], {"prompt": "What?"})
    with pytest.raises(ExchangeError, match=r"preferences\.jsonl, line 2: .*lacks"):
        file_examples(file)
    write(file)
    with pytest.raises(ExchangeError, match="holds no rows"):
        file_examples(file)
