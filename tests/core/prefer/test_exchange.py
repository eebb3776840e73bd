"""Files of preferences, in and out: what arrives, what is refused, what survives the journey."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentpref.errors import ExchangeError, NotAHome
from agentpref.prefer import exchange
from agentpref.prefer.exchange import Imported, export_pairs, export_thumbs, import_file
from agentpref.prefer.pairs import PairSet, pair_id_of, read_pairs
from agentpref.record.database import connect
from agentpref.record.home import Home
from agentpref.record.messages import prompt_of
from agentpref.record.store import Store
from agentpref.types import Pair, Thumb

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


def found(home: Home, namespace: str = "default") -> PairSet:
    with closing(connect(home)) as connection:
        return read_pairs(Store(connection), namespace, held_out=0.2)


def counts(imported: Imported) -> tuple[int, int, int]:
    return imported.added, imported.known, imported.bad


def preferences(pairs: PairSet) -> dict[str, tuple[str, str]]:
    return {p.prompt.messages[-1]["content"]: (p.chosen["content"], p.rejected["content"])
            for p in pairs.pairs}  # fmt: skip


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
        assert [(t.completion["content"], t.desirable) for t in result.thumbs] == [
            ("Yellow.", True),
            ("Purple.", False),
        ]
        assert result.left_out == {}

    def test_a_file_that_is_imported_twice_adds_nothing(self, home: Home, file: Path) -> None:
        write(file, *PAIRED, *UNPAIRED, PAIRED[0])
        assert counts(import_file(home, file)) == (4, 1, 0)
        before = found(home)
        assert counts(import_file(home, file)) == (0, 5, 0)
        assert found(home) == before

    def test_each_namespace_has_rows_of_its_own(self, home: Home, file: Path) -> None:
        write(file, *PAIRED)
        import_file(home, file, namespace="a")
        assert counts(import_file(home, file, namespace="b")) == (2, 0, 0)
        assert len(found(home, "a").pairs) == len(found(home, "b").pairs) == 2

    def test_the_judge_and_the_tag_are_as_told(self, home: Home, file: Path) -> None:
        write(file, *PAIRED)
        import_file(home, file, source="model", user_id="gpt", tag="colours")
        assert {(p.origin, p.tag) for p in found(home).pairs} == {("judge", "colours")}

    def test_a_persons_word_and_a_judges_on_the_same_row_are_two(
        self, home: Home, file: Path
    ) -> None:
        write(file, *PAIRED)
        import_file(home, file)
        assert counts(import_file(home, file, source="model")) == (2, 0, 0)
        assert [len(p.provenance) for p in found(home).pairs] == [2, 2]

    def test_a_later_line_supersedes_an_earlier_one(self, home: Home, file: Path) -> None:
        turned = {"prompt": "And the sea?", "chosen": "Red.", "rejected": "Green."}
        write(file, PAIRED[1], turned)
        import_file(home, file)
        assert preferences(found(home)) == {"And the sea?": ("Red.", "Green.")}

    def test_what_was_imported_is_sound(self, home: Home, file: Path) -> None:
        write(file, *PAIRED, *UNPAIRED)
        import_file(home, file)
        with closing(connect(home)) as connection:
            assert Store(connection).verify() == []

    def test_a_mark_of_byte_order_and_blank_lines_are_passed_over(
        self, home: Home, file: Path
    ) -> None:
        row = json.dumps(PAIRED[0]).encode()
        file.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row.replace(b"sky", b"sea"))
        assert counts(import_file(home, file)) == (2, 0, 0)

    def test_progress_is_told_after_every_batch(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exchange, "BATCH_LINES", 2)
        write(file, *({**PAIRED[0], "chosen": f"answer {n}"} for n in range(5)))
        seen: list[Imported] = []
        last = import_file(home, file, on_progress=seen.append)
        assert [one.added for one in seen] == [2, 4, 5]
        assert seen[-1] == last
        assert 0 < seen[0].bytes_read < last.bytes_read == last.bytes_total == file.stat().st_size


BAD_LINES = {
    b'{"prompt": "a", "chosen": "b"}': "lacks 'rejected'",
    b'["a", "b"]': "no JSON object; write one object on each line",
    b'{"prompt": "a", ': "it is no JSON",
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

    def test_bad_lines_may_be_skipped_and_are_counted(self, home: Home, file: Path) -> None:
        file.write_bytes(b"\n".join([*BAD_LINES, json.dumps(PAIRED[0]).encode()]))
        assert counts(import_file(home, file, skip_bad=True)) == (1, 0, 5)

    def test_a_gigantic_line_is_refused_and_can_be_skipped(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exchange, "MAX_LINE_BYTES", 200)
        write(file, PAIRED[0], {**PAIRED[0], "chosen": "x" * 900}, PAIRED[1])
        assert counts(import_file(home, file, skip_bad=True)) == (2, 0, 1)
        with pytest.raises(ExchangeError, match="line 2: the line is longer than 200 bytes"):
            import_file(home, file)

    def test_a_bad_line_undoes_its_own_batch_alone(
        self, home: Home, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exchange, "BATCH_LINES", 2)
        rows = [{**PAIRED[0], "chosen": f"answer {n}"} for n in range(3)]
        write(file, *rows, {"oops": 1})
        with pytest.raises(ExchangeError, match="line 4"):
            import_file(home, file)
        assert len(found(home).pairs) == 2

    @pytest.mark.parametrize("content", [b"", b"\n\n"])
    def test_a_file_without_rows_is_refused(self, home: Home, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        with pytest.raises(ExchangeError, match="holds no rows; name a file with a JSON object"):
            import_file(home, file)

    def test_a_file_that_cannot_be_opened_is_named(self, home: Home, tmp_path: Path) -> None:
        for path in (tmp_path / "missing.jsonl", tmp_path):
            with pytest.raises(ExchangeError, match=f"{path} cannot be read"):
                import_file(home, path)

    def test_a_home_that_is_none_is_not_blamed_on_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(NotAHome):
            import_file(Home(tmp_path), tmp_path / "missing.jsonl")

    def test_unknown_arguments_are_refused(self, home: Home, file: Path) -> None:
        arguments: list[dict[str, Any]] = [{"source": "robot"}, {"format": "csv"}]
        for argument in arguments:
            with pytest.raises(ExchangeError, match=r"is '(robot|csv)'; pass one of"):
                import_file(home, file, **argument)


def a_pair(prompt: str, chosen: str, rejected: str) -> Pair:
    asked = prompt_of([{"role": "user", "content": prompt}])
    better, worse = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    pair_id = pair_id_of(asked.id, better, worse)
    return Pair(pair_id, "default", 0.0, asked, better, worse, "comparison")


SKY = a_pair("What colour is the sky?", "Blue.", "Green.")


class TestExport:
    def test_a_file_is_replaced_whole(self, file: Path) -> None:
        file.write_text("what was there before")
        assert export_pairs([SKY], file) == 1
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            {
                "prompt": [{"role": "user", "content": "What colour is the sky?"}],
                "chosen": [{"role": "assistant", "content": "Blue."}],
                "rejected": [{"role": "assistant", "content": "Green."}],
                "tag": "untagged",
            }
        ]

    def test_an_export_that_fails_leaves_the_old_file_and_no_other(self, file: Path) -> None:
        def failing() -> Iterator[Pair]:
            yield SKY
            raise KeyError("the source fails")

        file.write_text("what was there before")
        with pytest.raises(KeyError):
            export_pairs(failing(), file)
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        assert file.read_text() == "what was there before"

    def test_a_path_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "no folder" / "out.jsonl"
        with pytest.raises(ExchangeError, match=r"out\.jsonl cannot be written"):
            export_pairs([SKY], path)

    def test_a_stream_is_written_to(self) -> None:
        stream = io.BytesIO()
        thumb = Thumb("r", "default", 0.0, SKY.prompt, SKY.chosen, desirable=True)
        assert export_thumbs([thumb], stream) == 1
        row = json.loads(stream.getvalue())
        assert (row["completion"], row["label"]) == ([SKY.chosen], True)

    def test_trl_reads_an_export_and_a_table_of_it_comes_back(self, home: Home, file: Path) -> None:
        """``datasets`` fills a column that only some rows have with nulls, in every row."""
        datasets = pytest.importorskip("datasets")
        data_utils = pytest.importorskip("trl.data_utils")
        tools = [{"type": "function", "function": {"name": "look_up"}}]
        prompt = prompt_of(SKY.prompt.messages, tools)
        with_tools = replace(
            SKY, prompt=prompt, pair_id=pair_id_of(prompt.id, SKY.chosen, SKY.rejected)
        )
        export_pairs([SKY, with_tools], file)
        table = datasets.Dataset.from_json(str(file), cache_dir=str(file.parent / "cache"))
        assert all(data_utils.is_conversational(row) for row in table)
        assert all(data_utils.maybe_extract_prompt(row) == row for row in table)
        write(file, *table)
        import_file(home, file)
        assert {p.pair_id for p in found(home).pairs} == {SKY.pair_id, with_tools.pair_id}


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
some_pairs = st.lists(
    st.tuples(words, words, words).filter(lambda said: said[1] != said[2]),
    min_size=1,
    max_size=5,
    unique_by=lambda said: said[0],
)


@settings(max_examples=10, deadline=None)
@given(some_pairs)
def test_preferences_survive_the_journey_out_and_in(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("journey")
    pairs = [a_pair(*texts) for texts in said]
    thumbs = [Thumb("r", "default", 0.0, p.prompt, p.chosen, desirable=True) for p in pairs]
    export_pairs(pairs, folder / "pairs.jsonl")
    export_thumbs(thumbs, folder / "thumbs.jsonl")
    home = Home.create(folder / "home")
    import_file(home, folder / "pairs.jsonl")
    import_file(home, folder / "thumbs.jsonl")
    arrived = found(home)
    assert {p.pair_id for p in arrived.pairs} == {p.pair_id for p in pairs}
    assert {(t.prompt.id, t.completion["content"], t.desirable) for t in arrived.thumbs} == {
        (t.prompt.id, t.completion["content"], t.desirable) for t in thumbs
    }
