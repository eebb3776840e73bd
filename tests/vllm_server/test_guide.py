"""docs/vllm.md does what it says, on a real vLLM."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from pathlib import Path

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
LET_THROUGH = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health"}


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


def test_the_proxy_of_the_guide_lets_four_paths_through_and_no_other() -> None:
    (proxy,) = (fence.text for fence in fences(GUIDE) if fence.language == "nginx")
    whole = set(re.findall(r"location = (\S+)", proxy))
    assert whole == LET_THROUGH
    rest = re.findall(r"location (?!= )(.*)", proxy)
    assert [" ".join(line.split()) for line in rest] == ["/ { return 404; }"]
