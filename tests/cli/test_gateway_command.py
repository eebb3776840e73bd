"""`agentpref gateway` as its users run it: a process, its keys, and what it refuses."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from agentpref.home import Home
from agentpref.record.log import Log

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


def test_a_gateway_with_a_reward_model_gives_the_best_of_several_answers(random_base, tmp_path):
    home = tmp_path / "home"
    with Log(home) as log:
        for number in range(60):
            asked = [{"role": "user", "content": f"What about {number}?"}]
            short, long = (log.record(asked, f"{number} " * words) for words in (1, 12))
            log.compare(short, long, winner="a")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0.8}
    with running("--model", random_base, "--home", home, "--reward") as (url, _):
        asked = {**body, "best_of": 3}
        early = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
        assert early.status_code >= 400
        assert "no reward model" in early.text
        call("reward", "fit", "--model", random_base, "--home", home, "--quiet")
        reply = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60)
        assert reply.status_code == 200, reply.text
        assert isinstance(reply.json()["choices"][0]["score"], float)
        plain = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert plain.json()["choices"][0].get("score") is None


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
        (("--upstream", "http://x/v1", "--reward"), "answers of --model, which is not given"),
        (("--upstream", "http://x/v1", "--value"), "answers of --model, which is not given"),
        (("--model", "tiny", "--reward", "--value"), "and so does --reward; name one of them"),
        (("--upstream", "api.example/v1"), "the upstream is 'api.example/v1'; give its address"),
        (("--upstream", "http://"), "give its address"),
        (("--upstream", "http://x/v1", "--cors", "chat.example"), "the scheme and the host"),
        (("--upstream", "http://x/v1", "--proxy", "nginx"), "give the proxy's address"),
        (
            ("--upstream", "http://127.0.0.1:9/v1", "--precision", "float32"),
            "--precision is how this process holds --model",
        ),
        (("--model", "tiny", "--precision", "float8"), "must be one of auto, float32, bfloat16"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_loaded(tmp_path, arguments, message):
    error = call("gateway", *arguments, "--home", tmp_path / "home", code=2)
    assert message in " ".join(re.sub(r"[│╭╰─╮╯]", " ", error).split())


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = call("gateway", "--model", "tiny", "--port", port, "--home", tmp_path / "h", code=2)
    assert f"cannot listen at 127.0.0.1, port {port}: address already in use" in error
    assert "loading" not in error


def test_a_key_of_a_folder_that_was_no_home_says_that_it_made_one(tmp_path):
    command = [*AGENTPREF, "gateway", "key", "add", "shop", "--home", str(tmp_path / "h")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("apk-shop-")
    assert "was no home; it is one now" in done.stderr


ENDLESS = """
import asyncio, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route
async def words():
    while True:
        yield b'data: {"choices": [{"index": 0, "delta": {"content": "so "}}]}\\n\\n'
        await asyncio.sleep(0.05)
async def answer(request):
    return StreamingResponse(words(), media_type="text/event-stream")
app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""


@pytest.mark.slow
def test_a_stream_that_outlasts_the_gateway_ends_with_an_error_and_is_logged_as_incomplete(
    tmp_path,
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    upstream = subprocess.Popen([sys.executable, "-c", ENDLESS, str(port)])
    home = tmp_path / "home"
    try:
        with running("--upstream", f"http://127.0.0.1:{port}/v1", "--home", home) as (url, process):
            body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
            while httpx.get(f"{url}/health").status_code != 200:
                time.sleep(0.1)
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
                lines = reply.iter_lines()
                while "so" not in next(lines):
                    pass
                process.send_signal(signal.SIGTERM)
                assert "the gateway is stopping" in [line for line in lines if line][-1]
            assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
            assert "Traceback" not in process.stderr.read()
    finally:
        upstream.kill()
        upstream.wait()
    (run,) = Home.open(home).runs()
    assert run.metadata["finish_reason"] == "incomplete"
    assert run.output["content"].startswith("so so")


@pytest.mark.parametrize(("proxies", "taken"), [((), 30), (("--proxy", "127.0.0.1"), 33)])
def test_only_a_proxy_that_is_named_says_who_asks(tmp_path, proxies, taken):
    home = tmp_path / "home"
    with Log(home) as log:
        run = log.record([{"role": "user", "content": "hi"}], "hello")
    with running("--upstream", "http://127.0.0.1:9/v1", "--home", home, *proxies) as (url, _):
        token = httpx.post(f"{url}/v1/feedback_tokens", json={"run_id": run}).json()["token"]
        thumb = {"inference_id": run, "metric_name": "thumbs", "value": True}
        asked = [{"Authorization": f"Bearer {token}", "X-Forwarded-For": f"10.0.0.{n}"}
                 for n in range(33)]  # fmt: skip
        with httpx.Client() as client:
            found = [client.post(f"{url}/feedback", json=thumb, headers=h) for h in asked]
    assert [answer.status_code for answer in found] == [200] * taken + [429] * (33 - taken)


def test_headers_without_end_are_refused(tmp_path):
    with running("--upstream", "http://127.0.0.1:9/v1", "--home", tmp_path / "home") as (url, _):
        try:
            status = httpx.get(f"{url}/health", headers={"X-Long": "x" * 200_000}).status_code
        except httpx.TransportError:  # it closed the connection before all was sent
            status = 400
        assert status == 400
        assert httpx.get(f"{url}/health").json()["status"] == "failing"


def test_the_model_is_held_in_the_precision_that_is_asked_for(monkeypatch) -> None:
    """A gateway's engine; the default is that of an update."""
    from agentpref_adapters import transformers
    from agentpref_cli.commands import gateway

    held = []

    class Backend:
        decode = None

        def __init__(self, model, *, precision):
            held.append(precision)

    monkeypatch.setattr(transformers, "TransformersBackend", Backend)
    for precision in ("float32", None):
        gateway._engine("tiny", (), 1.0, precision)
    assert held == ["float32", None]
