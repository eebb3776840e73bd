"""The whole way: a chat app, the gateway, its thumbs, an update, and the next answer is better."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import httpx
import openai
import pytest
from anyio import CapacityLimiter
from web import serving

import agentpref
from agentpref.home import Home
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.serve.watch import Watcher
from agentpref_adapters.gateway import Access, Gateway, Keys, Routed, create_app
from agentpref_adapters.transformers import TransformersBackend

pytestmark = pytest.mark.slow

ROWS = Path(__file__).parents[3] / "examples" / "preferences.jsonl"


@pytest.fixture
def gateway(tmp_path):
    home = Home.create(tmp_path / "home")
    backend = TransformersBackend("tiny")

    def open_upstream(namespace):
        router = Router(Registry(home, namespace=namespace), backend)
        Watcher(router, 0.05)
        return Routed(router, model="tiny", decode=backend.decode, limiter=CapacityLimiter(64))

    made = Gateway(
        lambda namespace: agentpref.Log(home.path, namespace=namespace),
        open_upstream,
        Access(Keys(home)),
    )
    with serving(create_app(made)) as url:
        yield url, home
    backend.close()


def test_what_people_like_and_correct_in_a_chat_app_is_written_the_next_day(gateway):
    url, home = gateway
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()[:160]]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def ask(number, message):
            return client.chat.completions.create(
                model="tiny", messages=rows[number]["prompt"], temperature=0, max_tokens=8,
                extra_headers={"X-LibreChat-Message-Id": message,
                               "X-LibreChat-Conversation-Id": f"chat {number}"},
            )  # fmt: skip

        right = 0
        for number, row in enumerate(rows):
            reply = ask(number, f"message {number}")
            wanted = row["chosen"][0]["content"]
            said = reply.choices[0].message.content
            right += said == wanted
            trace = hashlib.sha256(f"message {number}".encode()).hexdigest()[:32]
            body = {"inference_id": reply.id, "metric_name": "demonstration", "value": wanted}
            liked = {"id": f"s {number}", "traceId": trace, "name": "user-feedback", "value": 1}
            path, body = ("api/public/scores", liked) if said == wanted else ("feedback", body)
            assert httpx.post(f"{url}/{path}", json=body).status_code == 200
        assert reply.system_fingerprint == "base"

        report = agentpref.update(home.path, model="tiny")
        assert report.verdict == "promoted", report.reasons
        end = time.monotonic() + 20
        while (name := ask(0, "again").system_fingerprint) != report.revision:
            assert time.monotonic() < end, name
        later = sum(
            ask(n, "later").choices[0].message.content == row["chosen"][0]["content"]
            for n, row in enumerate(rows)
        )
    assert later > right + 20
