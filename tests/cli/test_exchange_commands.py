"""`import`, `export` and `pairs`: exports import again, and rows left out are counted."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from agentpref import plugins


def read(file: Path) -> list[dict]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def test_importing_a_file_twice_adds_nothing(run, filled, rows) -> None:
    assert run("import", rows).out == "added 0, known already 46\n"
    counts = run("import", rows, "--json").json
    assert (counts["added"], counts["known"], counts["bad"]) == (0, 46, 0)
    assert counts["bytes_read"] == counts["bytes_total"] == rows.stat().st_size


def test_a_bad_line_is_named_and_can_be_skipped(run, home, tmp_path) -> None:
    run("init")
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n[1]\n', encoding="utf-8")
    assert f"{file}, line 2:" in run("import", file, exits=1).err
    result = run("import", file, "--skip-bad")
    assert "skipped bad rows: 1" in result.out
    assert run("pairs", "--json").json["strata"][0]["train"] == 1


def test_columns_that_were_not_read_are_named(run, home, tmp_path) -> None:
    run("init")
    file = tmp_path / "rated.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "rater": "ana"}
    file.write_bytes(orjson.dumps(row))
    told = "columns that were not read, and in how many rows: margin (1), rater (1)\n"
    assert run("import", file).out.endswith(told)
    assert run("import", file, "--json").json["ignored"] == {"margin": 1, "rater": 1}


def test_a_missing_file_is_named(run, home) -> None:
    run("init")
    assert "nowhere.jsonl cannot be read" in run("import", "nowhere.jsonl", exits=1).err


def test_import_stores_tag_source_and_user(run, home, rows) -> None:
    run("init")
    run("import", rows, "--tag", "art", "--source", "code", "--user-id", "judge-1")
    (stratum,) = run("pairs", "--json").json["strata"]
    assert (stratum["tag"], stratum["origin"]) == ("art", "judge")
    assert "'cat'" in run("import", rows, "--source", "cat", exits=2).err


def test_import_redacts_texts_with_redact(run, home, tmp_path) -> None:
    run("init")
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "I am ana@example.org.", "chosen": "Hi!", "rejected": "Who?"}
    file.write_bytes(orjson.dumps(row))
    assert run("import", file, "--redact").out == "added 1, known already 0\n"
    [pair] = run("pairs", "--json").json["newest"]
    assert pair["prompt"] == "I am [email]."


def test_a_named_format_that_the_rows_do_not_have_is_refused(run, home, rows) -> None:
    run("init")
    assert "lacks" in run("import", rows, "--format", "unpaired", exits=1).err


@pytest.mark.parametrize("command", [("import", "rows.jsonl"), ("export",)])
def test_an_unknown_format_is_refused_with_the_nearest_name(run, filled, command) -> None:
    assert "did you mean 'openai'" in run(*command, "--format", "openapi", exits=2).err


def test_export_writes_the_pairs_that_were_imported(run, filled, rows, tmp_path) -> None:
    file = tmp_path / "out.jsonl"
    assert run("export", "--output", file).out == f"wrote 40 rows to {file}\n"
    written = {row["prompt"][0]["content"]: row["chosen"][0]["content"] for row in read(file)}
    assert written == {row["prompt"]: row["chosen"] for row in read(rows) if "chosen" in row}
    assert run("export").out == file.read_text(encoding="utf-8"), "the same to standard output"


def test_the_two_sides_of_the_split_make_up_the_whole(run, filled) -> None:
    train, held_out = (run("export", "--split", side).out for side in ("train", "held-out"))
    assert train
    assert held_out
    assert sorted(run("export").out.splitlines()) == sorted((train + held_out).splitlines())
    nearly_all = run("export", "--split", "held-out", "--held-out", "0.99").out
    assert len(nearly_all) > len(held_out)


def test_thumbs_are_exported_as_the_unpaired_format(run, filled, tmp_path) -> None:
    file = tmp_path / "thumbs.jsonl"
    assert run("export", "--format", "unpaired", "-o", file, "--json").json["rows"] == 6
    assert sorted(row["label"] for row in read(file)) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("format", ["preference", "openai", "llamafactory", "unpaired"])
def test_every_format_can_be_exported_and_imported_again(
    run, filled, tmp_path, monkeypatch, format, suffix
) -> None:
    file, rows = tmp_path / f"out.{suffix}", 6 if format == "unpaired" else 40
    done = run("export", "--format", format, "-o", file, "--json").json
    assert done == {"file": str(file), "held_out": 0.2, "rows": rows, "bad": 0}
    pairs = run("pairs", "--json", "--limit", "99").json
    monkeypatch.setenv("AGENTPREF_HOME", str(tmp_path / "other"))
    run("init")
    assert run("import", file).out == f"added {rows}, known already 0\n"
    again = run("pairs", "--json", "--limit", "99").json
    kind = "thumbs" if format == "unpaired" else "newest"
    names = (lambda value: value) if kind == "thumbs" else (lambda p: {one["pair"] for one in p})
    assert names(again[kind]) == names(pairs[kind])


def test_rows_that_a_format_cannot_hold_are_named_or_skipped(run, filled, tmp_path) -> None:
    prompt = [{"role": "user", "content": text} for text in ("Hello!", "Anyone?")]
    rows, out = tmp_path / "twice.jsonl", tmp_path / "out.jsonl"
    rows.write_bytes(orjson.dumps({"prompt": prompt, "chosen": "Yes.", "rejected": "No."}))
    run("import", rows)
    wanted = ("export", "--format", "llamafactory", "-o", out)
    assert "row 41 (example " in run(*wanted, exits=1).err
    assert not out.exists()
    printed = run(*wanted, "--skip-bad").out.splitlines()
    assert printed == [
        f"wrote 40 rows to {out}",
        "skipped rows that the format cannot hold: 1",
    ]


def test_import_and_export_report_their_progress(run, filled, rows, tmp_path) -> None:
    assert run("export", "-o", tmp_path / "out.jsonl").err.splitlines() == [
        "writing (rows)",
        "writing (rows): 40/40",
    ]
    kilobytes = rows.stat().st_size // 1000
    assert run("import", rows).err.splitlines() == [
        "reading (kB)",
        f"reading (kB): {kilobytes}/{kilobytes}",
    ]
    assert run("import", rows, "--json", "--quiet").err == ""


def test_export_refuses_json_without_output(run, filled) -> None:
    result = run("export", "--json", exits=2)
    assert result.out == ""
    assert "--output" in result.err


def test_a_file_that_cannot_be_written_is_named(run, filled, tmp_path) -> None:
    assert "cannot be written" in run("export", "-o", tmp_path / "no" / "x", exits=1).err


def test_pairs_are_counted_by_stratum_and_the_newest_shown(run, filled) -> None:
    value = run("pairs", "--json", "--limit", "2").json
    (stratum,) = value["strata"]
    assert (stratum["tag"], stratum["origin"]) == ("bread", "comparison")
    assert stratum["train"] + stratum["held_out"] == 40
    assert value["thumbs"] == 6
    assert [pair["chosen"] for pair in value["newest"]] == ["In oven 39.", "In oven 38."]
    out = run("pairs", "--limit", "2").out
    assert "How is bread 39 baked?\tIn oven 39.\tNo idea." in out
    assert "In oven 37." not in out
    assert "lone thumbs, trained beside the pairs: 6" in out


@pytest.mark.parametrize(("share", "side"), [("0.001", "train"), ("0.999", "held_out")])
def test_pairs_take_the_share_that_is_held_out(run, filled, share, side) -> None:
    (stratum,) = run("pairs", "--json", "--held-out", share).json["strata"]
    assert stratum[side] == 40


def test_pairs_of_an_empty_home_say_how_to_get_some(run, home) -> None:
    run("init")
    assert run("pairs").out.startswith("no pairs yet")


def test_rows_left_out_of_the_pairs_are_counted_by_reason(run, filled, tmp_path) -> None:
    file = tmp_path / "opposite.jsonl"
    row = {"prompt": "How is bread 1 baked?", "chosen": "No idea.", "rejected": "In oven 1."}
    file.write_bytes(orjson.dumps(row))
    run("import", file)
    left_out = run("pairs", "--json").json["left_out"]
    assert sum(left_out.values()) >= 1
    reason = next(iter(left_out)).replace("_", " ")
    assert f"left out, {reason}: " in run("pairs").out


CSV = "prompt,chosen,rejected\nHow is it made?,With flour.,By magic.\n"


def test_import_reads_standard_input_of_any_kind(run, home) -> None:
    """As in `zstdcat rows.zst | agentpref import -`, through real pipes."""
    run("init")
    row = '{"prompt": "How is it made?", "chosen": "With flour.", "rejected": "By magic."}\n'
    command = [sys.executable, "-m", "agentpref_cli", "import", "-"]
    for content, added in ((row.encode(), 1), (gzip.compress(CSV.encode()), 0)):
        done = subprocess.run(command, input=content, capture_output=True, check=True)
        assert done.stdout.decode() == f"added {added}, known already {1 - added}\n"
    done = subprocess.run(command, input=b"PAR1", capture_output=True, check=False)
    assert done.returncode == 1
    assert b"<stdin>: it is Parquet, which is not read in order; save it as a file" in done.stderr
    done = subprocess.run(command, input=b"{}\nnot JSON\n", capture_output=True, check=False)
    assert done.stderr.splitlines()[-1].startswith(b"error: <stdin>, line 1: the row has the keys")


def test_import_reads_csv_and_names_a_bad_row(run, home, tmp_path) -> None:
    run("init")
    file = tmp_path / "rows.csv"
    file.write_text(CSV + "Why?,So.\n", encoding="utf-8")
    failed = run("import", file, exits=1)
    assert failed.err.endswith(
        f"error: {file}, line 3: it has 2 cells, and the header names 3 columns; put each text "
        'with a delimiter, a quote or a line break in "quotes", and double its quotes\n'
    )
    value = run("import", file, "--skip-bad", "--json").json
    assert (value["added"], value["bad"]) == (1, 1)


def test_a_format_that_is_named_holds_for_csv_too(run, home, tmp_path) -> None:
    run("init")
    file = tmp_path / "rows.csv"
    file.write_text(CSV, encoding="utf-8")
    failed = run("import", file, "--format", "unpaired", exits=1)
    assert "lacks 'completion', 'label'" in failed.err


def test_an_export_that_gzip_packs_is_imported_again(run, filled, tmp_path) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    assert run("export", "--output", file).out == f"wrote 40 rows to {file}\n"
    run("init", "--home", tmp_path / "other")
    assert "added 40" in run("import", file, "--home", tmp_path / "other").out
    assert len(run("export", "-o", "-").out.splitlines()) == 40
    assert not Path("-").exists()


def test_a_log_of_another_product_says_what_was_left_out_and_what_to_import_first(
    run, home, tmp_path
) -> None:
    run("init")
    step = {"id": "o", "traceId": "t", "type": "SPAN", "startTime": "2026-11-01T00:00:00Z"}
    called = {**step, "id": "p", "type": "GENERATION", "input": "Why?", "output": "So.", "x": 1}
    said = {"id": "s", "name": "user-feedback", "source": "API", "dataType": "BOOLEAN",
            "value": 1, "traceId": "t", "timestamp": "2026-11-02T00:00:00Z"}  # fmt: skip
    runs, scores = tmp_path / "runs.jsonl", tmp_path / "scores.jsonl"
    runs.write_bytes(orjson.dumps(step) + b"\n" + orjson.dumps(called))
    scores.write_bytes(orjson.dumps(said))
    assert "import the file with the runs first" in run("import", scores, exits=1).err
    assert run("import", runs).out.splitlines() == [
        "added 1, known already 0",
        "left out, as they are no model call and no score of one: "
        "langfuse: observation of type SPAN (1)",
        "columns that were not read, and in how many rows: x (1)",
    ]
    assert run("import", scores, "--format", "langfuse", "--json").json["added"] == 1
    assert run("stats", "--json").json["default"]["feedback"] == 1


def test_the_help_of_import_lists_the_formats_that_are_registered(run) -> None:
    shown = run("import", "--help").out
    for name in plugins.names(plugins.FORMATS):
        assert name in shown


def test_a_format_of_logs_is_no_format_of_an_export(run, filled) -> None:
    assert "which is only read" in run("export", "--format", "otlp", exits=2).err
