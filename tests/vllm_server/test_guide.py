"""docs/vllm.md does what it says, on a real vLLM."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from proxy import Proxy

from agentpref.home import Home
from agentpref.models.base_files import BaseFiles
from agentpref.serve.registry import Registry
from agentpref_adapters._vllm_process import VllmProcess

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from sessions import fences, normal, play  # noqa: E402

GUIDE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
LET_THROUGH = {"/v1/completions", "/v1/chat/completions", "/health"}
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


def test_every_snippet_of_the_guide_runs(
    server: VllmProcess,
    open_backend,  # which tidies up afterwards
    base: BaseFiles,
    adapters: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AGENTPREF_HOME", raising=False)
    registry = Registry(Home.create(tmp_path / ".agentpref"))
    revision = registry.publish(adapters[0], parent=None, model=base.identity, training={})
    registry.promote(revision.revision_id)
    with closing(Proxy(server.url)) as second:
        guide = GUIDE.replace("http://127.0.0.1:8000", server.url)
        guide = guide.replace("http://127.0.0.1:8001", second.url)
        guide = guide.replace('"/adapters"', repr(str(registry.home.adapters)))
        played = [one for one in play(guide, tmp_path) if one.written]
    assert [normal(one.written) for one in played] == [normal(one.fence.text) for one in played]
    assert len(played) == 1


def test_the_proxy_of_the_guide_lets_three_paths_through_and_no_other() -> None:
    (proxy,) = (fence.text for fence in fences(GUIDE) if fence.language == "nginx")
    whole = set(re.findall(r"location = (\S+)", proxy))
    assert whole == LET_THROUGH
    rest = re.findall(r"location (?!= )(.*)", proxy)
    assert [" ".join(line.split()) for line in rest] == ["/ { return 404; }"]
    assert "client_max_body_size" in proxy


def test_the_table_lists_every_path_that_the_key_does_not_guard(server: VllmProcess) -> None:
    """vLLM logs its routes at the start; the mount of /metrics is not one of them."""
    log = server.log.read_text(encoding="utf-8", errors="replace")
    routes = set(re.findall(r"Route: (/\S*), ", log))
    assert {"/v1/completions", "/openapi.json"} <= routes, "vLLM logs its routes another way"
    (table,) = re.findall(r"\| path \| what anybody.*?\n\n", GUIDE, re.DOTALL)
    named = set(re.findall(r"`(/[^`]*)`", table))
    open_ones = {path for path in routes if not path.startswith(GUARDED)}
    plain = {re.sub(r"\{\w+\}", "{name}", path) for path in open_ones}
    assert plain | {"/metrics"} == named


def test_a_request_for_thousands_of_answers_is_refused_at_once(server: VllmProcess) -> None:
    body = {"model": "base", "prompt": "Hello", "n": 5000, "max_tokens": 8}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=5, trust_env=False)
    assert answer.status_code == 400
    assert "at most 16" in answer.text
