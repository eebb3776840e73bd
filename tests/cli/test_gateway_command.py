"""`agentpref gateway` as its users run it: a process, its keys, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

AGENTPREF = [sys.executable, "-m", "agentpref_cli"]


def call(*arguments, code=0):
    done = subprocess.run([*AGENTPREF, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@contextmanager
def running(*arguments):
    command = [*AGENTPREF, "gateway", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"answers at (\S+)/v1", line):
                break
        else:
            pytest.fail(process.stderr.read())
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def test_a_model_alone_is_a_working_server_that_logs_and_ends_cleanly(random_base, tmp_path):
    home = tmp_path / "home"
    with running("--model", random_base, "--home", home) as (url, process):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.json()["system_fingerprint"] == "base"
        thumb = {"inference_id": reply.json()["id"], "metric_name": "thumbs", "value": True}
        assert httpx.post(f"{url}/feedback", json=thumb).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    stats = json.loads(call("stats", "--home", home, "--json"))
    assert (stats["default"]["runs"], stats["default"]["feedback"]) == (1, 1)


def test_keys_are_made_shown_once_listed_and_removed(tmp_path):
    home = ("--home", tmp_path / "home")
    key = call("gateway", "key", "add", "shop", "--namespace", "shop", *home).strip()
    assert key.startswith("apk-shop-")
    listed = call("gateway", "key", "list", *home)
    assert "shop" in listed
    assert key not in listed
    assert "already" in call("gateway", "key", "add", "shop", *home, code=2)
    assert "letters" in call("gateway", "key", "add", "a b", *home, code=2)
    call("gateway", "key", "remove", "shop", *home)
    assert "there are: none" in call("gateway", "key", "remove", "shop", *home, code=2)
    assert json.loads(call("gateway", "key", "list", *home, "--json")) == {"keys": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name what answers"),
        (("--vllm", "http://127.0.0.1:8000"), "name what answers"),
        (("--upstream", "http://x/v1", "--vllm", "http://y", "--model", "tiny"), "name what"),
        (("--upstream", "http://x/v1", "--host", "0.0.0.0"), "there is no API key"),
        (("--upstream", "api.example/v1"), "the upstream is 'api.example/v1'; give its address"),
        (("--upstream", "http://"), "give its address"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_loaded(tmp_path, arguments, message):
    error = call("gateway", *arguments, "--home", tmp_path / "home", code=2)
    assert message in " ".join(re.sub(r"[│╭╰─╮╯]", " ", error).split())
