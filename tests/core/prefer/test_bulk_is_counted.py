"""Whatever writes many rows leaves few of them for a reader to count."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import orjson
import pytest

from agentpref.home import Home
from agentpref.prefer.exchange import import_file
from agentpref.record.database import connect
from agentpref.record.log import Log
from agentpref.record.tallies import LAG
from agentpref.record.transfer.merge import merge

ROWS = LAG + 500


@pytest.fixture
def imported(tmp_path: Path) -> Home:
    file = tmp_path / "rows.jsonl"
    rows = ({"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(ROWS))
    file.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    home = Home.create(tmp_path / "imported")
    import_file(home, file)
    return home


def counted(home: Home) -> tuple[int, int]:
    with closing(connect(home)) as connection:
        query = "SELECT sum(runs), sum(comparisons) FROM tally"
        runs, comparisons = connection.execute(query).fetchone()
    return runs, comparisons


def test_importing_counts(imported: Home) -> None:
    runs, comparisons = counted(imported)
    assert 0 <= 2 * ROWS - runs < LAG
    assert 0 <= ROWS - comparisons < LAG


def test_merging_counts(imported: Home, tmp_path: Path) -> None:
    into = Home.create(tmp_path / "into")
    merge(into, [imported.path])
    runs, comparisons = counted(into)
    assert 0 <= 2 * ROWS - runs < LAG
    assert 0 <= ROWS - comparisons < LAG


def test_logging_counts(tmp_path: Path) -> None:
    with Log(tmp_path / "home", queue_size=ROWS) as log:
        for number in range(ROWS):
            log.record([{"role": "user", "content": f"{number}?"}], "yes")
        log.flush()
    assert 0 <= ROWS - counted(log.home)[0] < LAG
