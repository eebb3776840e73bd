"""`agentpref review` prints an address for each annotator, and serves the page there."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from agentpref.record.log import Log


def test_the_page_is_served_at_the_printed_addresses(home: Path) -> None:
    with Log(home) as log:
        for text in ("Yes.", "Well, yes."):
            log.record([{"role": "user", "content": "Is it?"}], text)
    command = [sys.executable, "-m", "agentpref_cli", "review", "--port", "0", "--home", str(home)]
    command += ["--annotator", "ana", "--annotator", "ben"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            found = [re.fullmatch(r"(\w+): (http://127.0.0.1:\d+/login\?token=\S+)\n", one)
                     for one in lines]  # fmt: skip
            assert [one and one[1] for one in found] == ["ana", "ben"]
            with httpx.Client(follow_redirects=True, timeout=30) as client:
                assert found[0] is not None
                page = client.get(found[0][2])
                assert "Which answer is better?" in page.text
                assert "ana in default" in page.text
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def test_a_wrong_namespace_is_said_at_once(run, home) -> None:
    with Log(home) as log:
        log.record([{"role": "user", "content": "Is it?"}], "Yes.")
    assert "no namespace 'other'" in run("review", "--namespace", "other", exits=1).err
