"""How values look, piped and on a terminal."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpref.printable import escaped
from agentpref_cli.commands.serve import Printer
from agentpref_cli.terminal import (
    Warnings,
    _stage_lines,
    cell,
    facts,
    fail,
    moment,
    one_line,
    print_result,
    progress,
    say,
    show_checks,
    table,
)


@given(st.text())
def test_a_cell_has_no_control_characters(text: str) -> None:
    shown = cell(text)
    assert shown.isprintable()
    assert "\t" not in shown
    assert "\n" not in shown


@given(st.text(), st.integers(1, 20))
def test_a_line_is_cut_to_its_limit(text: str, limit: int) -> None:
    assert len(one_line(text, limit)) <= limit
    assert one_line(text, limit=10**6) == one_line(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (True, "yes"), (False, "no"), (3, "3"), (0.123456, "0.1235"), (" a\tb\n", "a b")],
)
def test_values_are_written_in_short(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_a_missing_time_is_a_dash() -> None:
    assert moment(None) == "-"


def test_a_piped_table_is_tab_separated(capsys: pytest.CaptureFixture[str]) -> None:
    table(("name", "n"), [("a b", 1), ("c\td", 2.0)])
    assert capsys.readouterr().out == "name\tn\na b\t1\nc d\t2\n"


def test_checks_are_shown_with_their_messages(capsys: pytest.CaptureFixture[str]) -> None:
    show_checks([{"name": "KL budget", "passed": False, "message": "too far"}])
    assert capsys.readouterr().out == "check\tpassed\tmessage\nKL budget\tno\ttoo far\n"


def test_piped_progress_is_one_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=False) as report:
        assert report is not None
        for done in range(1, 4):
            report("training", done, 3)
        report("judging", 1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["training", "training: 3/3", "judging"]


def test_progress_is_silent_where_that_is_asked() -> None:
    with progress(quiet=True) as report:
        assert report is None


def test_a_long_stage_says_where_it_is_every_fifteen_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    report = _stage_lines(lambda: now)
    for done in range(1, 41):
        report("training", done, 40)
        now += 1.0
    assert capsys.readouterr().err.splitlines() == [
        "training",
        "training: 16/40",
        "training: 31/40",
        "training: 40/40",
    ]


def test_a_heading_stays_whole_in_a_narrow_window() -> None:
    code = """
from agentpref_cli.terminal import table
names = ("namespace", "runs", "threads", "users", "feedback", "corrections", "comparisons")
row = ("customer-support", 1200000, 33000, 4100, 90000, 1234, 56789, "2026-11-28 23:14:16")
table((*names, "last run"), [row])
"""
    shown = _on_a_terminal(code)
    for heading in ("namespace", "threads", "feedback", "corrections", "comparisons"):
        assert heading in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 80


def test_a_terminal_shows_a_drawn_table_and_a_bar() -> None:
    code = """
from agentpref_cli.terminal import GOOD, progress, table
with progress(quiet=False) as report:
    report("training", 1, 2)
table(("name", "[bold]n[/bold]"), [("live", 1)], styles={"live": GOOD})
"""
    shown = _on_a_terminal(code)
    assert "training" in shown
    assert "1/2" in shown
    assert "[bold]n[/bold]" in shown, "mark-up in a text is printed as it is"
    assert "\x1b[32mlive" in shown
    assert "───" in shown


def _on_a_terminal(code: str, columns: int = 80) -> str:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while part := _read(ours):
            shown += part
        process.wait(timeout=60)
    os.close(ours)
    return shown.decode()


TABLES = {
    "stats": (
        ["namespace", "runs", "threads", "users", "feedback", "corrections", "comparisons", "last"],
        [("default", 500_000, 12_000, 400, 30_000, 100, 2_000, "2026-11-29 09:22:21")],
    ),
    "adapters": (
        ["revision", "serves", "parent", "created", "status"],
        [
            ("rev-000001-0123456789ab", "live", "base", "2026-11-29 09:22:21", None),
            ("rev-000002-ba9876543210", "canary", "rev-000001-0123456789ab",
             "2026-11-30 09:22:21", "quarantined"),
        ],
    ),
    "report": (
        ["check", "passed", "message"],
        [("KL budget", False, "too far from the base, by 0.3 nats a token; " * 4)],
    ),
    "pairs": (
        ["pair", "prompt", "chosen", "rejected"],
        [("0123abcd", "word " * 12, "https://example.org/a-long-address", "answer " * 9)],
    ),
    "updates": (
        ["update", "time", "verdict", "pairs", "before", "after", "revision"],
        [("01a1fa19-92dd-7eab-8b9b-dfc8e3d45514", "2026-11-29 09:22:21", "insufficient", 12,
          0.5, 0.83, "rev-000002-ba9876543210")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("columns", [80, 60, 30])
def test_no_heading_and_no_id_is_broken_on_a_narrow_terminal(columns: int) -> None:
    code = f"from agentpref_cli.terminal import table\nfor t in {[*TABLES.values()]}: table(*t)"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", _on_a_terminal(code, columns)).replace("\r", "")
    for headings, rows in TABLES.values():
        for text in (*headings, *(cell(value) for row in rows for value in row)):
            for word in text.split():
                assert word in plain.split(), (columns, word)
    if columns > 30:  # a value alone may be longer, and the terminal breaks it
        assert max(map(len, plain.splitlines())) <= columns


def test_what_does_not_fit_side_by_side_is_a_line_for_each_value() -> None:
    code = f"from agentpref_cli.terminal import table\ntable(*{TABLES['updates']})"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", _on_a_terminal(code)).replace("\r", "")
    assert plain.splitlines()[:3] == [
        "update    01a1fa19-92dd-7eab-8b9b-dfc8e3d45514",
        "time      2026-11-29 09:22:21",
        "verdict   insufficient",
    ]


def test_a_warning_is_one_line_and_says_what_was_raised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.Logger("agentpref")
    logger.addHandler(Warnings(logging.WARNING))
    logger.info("all is well")
    try:
        raise OSError("no room\n\x1b[2J on the disk")
    except OSError:
        logger.warning("%s is not in quarantine", "rev-000001", exc_info=True)
    said = "warning: rev-000001 is not in quarantine: no room [2J on the disk\n"
    assert capsys.readouterr().err == said


def test_where_columns_close_to_one_another_fit_no_cell_is_broken() -> None:
    columns = ["time", "verdict", "pairs", "accuracy", "took", "serves", "id"]
    night = ["2026-11-29 17:14", "insufficient", 128, ".50 -> .78", "1,820 s", "canary"]
    code = f"from agentpref_cli.terminal import table\ntable({columns}, [{[*night, 'rev-000001']}])"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", _on_a_terminal(code)).replace("\r", "")
    (row,) = [line for line in plain.splitlines() if "17:14" in line]
    assert row.split() == [*" ".join(map(str, night)).split(), "rev-000001"]


def _read(terminal: int) -> bytes:
    """Linux answers the end of a terminal with an error, others with nothing."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


HOSTILE = "a\u009b31mb\u202ec\u2066d\u200be\x07f\u2028g\U000e0041h\x7fi\x1b[2Jj\ufeff"


@given(st.text() | st.just(HOSTILE))
def test_json_holds_no_raw_control_and_reads_back_as_the_same(text: str) -> None:
    written = escaped(json.dumps({text: [text]}, ensure_ascii=False))
    assert written.isprintable()
    assert json.loads(written) == {text: [text]}


def test_what_is_printed_holds_no_raw_control(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(True, {"text": HOSTILE}, lambda: None)
    say(HOSTILE)
    facts({"name": HOSTILE})
    fail(HOSTILE)
    table(("column",), [(HOSTILE,)])
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).split("\n")
    assert len(lines) == 7
    assert all(line.expandtabs().isprintable() for line in lines)
    assert json.loads(lines[0]) == {"text": HOSTILE}


@pytest.mark.parametrize("as_json", [True, False])
def test_an_event_of_serve_holds_no_raw_control(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Printer(as_json)("warning", HOSTILE, url=HOSTILE)
    (line,) = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert line.isprintable()
    if as_json:
        assert json.loads(line) == {"event": "warning", "message": HOSTILE, "url": HOSTILE}


def test_a_time_beyond_the_calendar_is_written_as_a_number() -> None:
    assert moment(1e300) == "1e+300 s"
