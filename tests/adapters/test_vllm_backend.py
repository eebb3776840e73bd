"""The client of vLLM servers, on a stand-in; tests/vllm_server has the real one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    InvalidAdapter,
    ServerUnreachable,
    SwapFailed,
    WrongBase,
)
from agentpref.home import Home
from agentpref.models.base import find_base, load_tokenizer
from agentpref.models.base_files import read_base
from agentpref.models.template import ChatTemplate
from agentpref.models.tokenizer import encode_prompt
from agentpref.serve.backend import GenerationRequest, Reply, Revision, ServingBackend
from agentpref.serve.folders import WEIGHTS_FILE
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.testing import write_adapter
from agentpref.types import BASE, Prompt
from agentpref_adapters._vllm_server import Server
from agentpref_adapters.vllm import VllmBackend, has_loaded, open_router
from tests.adapters.vllm_stand_in import END_OF_TURN, LENGTH, StandIn, written

ROOT = str(find_base("tiny"))
ASK = GenerationRequest(messages=({"role": "user", "content": "When is high tide?"},))
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def server() -> Iterator[StandIn]:
    server = StandIn(ROOT)
    yield server
    server.stop()


@pytest.fixture
def other() -> Iterator[StandIn]:
    server = StandIn(ROOT)
    yield server
    server.stop()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Home.create(tmp_path / "home"))


@pytest.fixture
def publish(registry: Registry, tmp_path: Path) -> Callable[[], Revision]:
    base, seeds = read_base("tiny"), itertools.count()
    assert base.layers is not None
    layers = {LAYER: base.layers[LAYER]}

    def publish() -> Revision:
        seed = next(seeds)
        folder = write_adapter(tmp_path / f"adapter-{seed}", seed=seed, layers=layers)
        return registry.publish(folder, parent=None, model=base.identity, training={})

    return publish


def connect(*servers: StandIn, patience: float = 0.0, **settings) -> VllmBackend:
    urls = [server.url for server in servers]
    return VllmBackend(*urls, model="tiny", patience=patience, **settings)


def ready(backend: VllmBackend, revision: Revision) -> str:
    backend.validate(revision)
    backend.load(revision)
    backend.probe(revision.revision_id)
    return revision.revision_id


def prompt_ids(request: GenerationRequest) -> tuple[int, ...]:
    tokenizer = load_tokenizer("tiny", find_base("tiny"))
    return encode_prompt(Prompt("", request.messages, request.tools), ChatTemplate(tokenizer))


def text_of(tokens: list[int]) -> str:
    return str(load_tokenizer("tiny", find_base("tiny")).decode(tokens, skip_special_tokens=True))


class TestAnswers:
    def test_it_implements_the_protocol(self, server: StandIn) -> None:
        with closing(connect(server)) as backend:
            assert isinstance(backend, ServingBackend)

    def test_a_reply_has_the_tokens_of_the_server(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server)) as backend:
            name = ready(backend, publish())
            reply = backend.generate(name, ASK)
        tokens = written(name, prompt_ids(ASK))
        assert reply.revision == name
        assert reply.token_ids == tuple(tokens)
        assert reply.message == {"role": "assistant", "content": text_of(tokens[:-1])}
        assert reply.logprobs == (-0.5,) * len(tokens)
        assert reply.finish_reason == "stop"

    def test_the_base_is_requested_by_the_servers_name_for_it(self, server: StandIn) -> None:
        with closing(connect(server)) as backend:
            reply = backend.generate(BASE, ASK)
        assert reply.revision == BASE
        assert reply.token_ids == tuple(written("served", prompt_ids(ASK)))

    def test_the_prompt_is_sent_as_the_tokens_that_training_uses(self, server: StandIn) -> None:
        tool = {"type": "function", "function": {"name": "tides", "parameters": {"b": 1, "a": 2}}}
        ask = GenerationRequest(messages=ASK.messages, tools=(tool,))
        with closing(connect(server)) as backend:
            backend.generate(BASE, ask)
        (body,) = server.of("/v1/completions")
        assert tuple(body["prompt"]) == prompt_ids(ask)
        assert body["add_special_tokens"] is False

    def test_instructions_of_a_revision_are_sent_with_its_requests_alone(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        revision = publish()
        told = replace(revision, manifest={**revision.manifest, "instructions": "Be brief."})
        system = {"role": "system", "content": "Be brief."}
        with closing(connect(server)) as backend:
            name = ready(backend, revision)
            backend._revisions[name] = told
            backend.generate(name, ASK)
            backend.generate(BASE, ASK)
        instructed, plain = server.of("/v1/completions")[-2:]
        asked = replace(ASK, messages=(system, *ASK.messages))
        assert tuple(instructed["prompt"]) == prompt_ids(asked)
        assert tuple(plain["prompt"]) == prompt_ids(ASK)

    def test_every_sampling_setting_is_sent(self, server: StandIn) -> None:
        ask = GenerationRequest(
            messages=ASK.messages, max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("x",)
        )
        with closing(connect(server)) as backend:
            backend.generate(BASE, ask)
        (body,) = server.of("/v1/completions")
        assert {key: body[key] for key in ("max_tokens", "temperature", "top_p", "seed")} == {
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
        }
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0.0, 1.0)
        assert (body["presence_penalty"], body["frequency_penalty"]) == (0.0, 0.0)
        assert body["stop"] == ["x"]
        assert body["stop_token_ids"] == [END_OF_TURN]
        assert (body["ignore_eos"], body["min_tokens"]) == (False, 0)
        assert body["skip_special_tokens"] is True, "stop strings are searched in the same text"

    def test_every_end_token_of_the_base_is_sent_and_none_of_its_other_settings(
        self, tmp_path: Path
    ) -> None:
        shutil.copytree(ROOT, tmp_path / "base")
        first = written("served", prompt_ids(ASK))[0]
        settings = {"eos_token_id": [first, 7], "repetition_penalty": 1.3, "top_k": 5}
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
        server, model = StandIn(str(tmp_path / "base")), str(tmp_path / "base")
        with closing(VllmBackend(server.url, model=model)) as backend:
            reply = backend.generate(BASE, ASK)
        server.stop()
        (body,) = server.of("/v1/completions")
        assert body["stop_token_ids"] == sorted([END_OF_TURN, first, 7])
        assert (body["top_k"], body["repetition_penalty"]) == (0, 1.0)
        assert not set(reply.message) - {"role", "content"}
        said = [t for t in reply.token_ids if t not in body["stop_token_ids"]]
        assert reply.message["content"] == text_of(said), "no end token is part of the text"

    def test_an_answer_that_is_too_long_is_cut_off(self, server: StandIn) -> None:
        with closing(connect(server)) as backend:
            reply = backend.generate(BASE, GenerationRequest(messages=ASK.messages, max_tokens=2))
        assert len(reply.token_ids) == 2
        assert reply.finish_reason == "length"

    def test_a_long_prompt_leaves_room_for_fewer_tokens(self, server: StandIn) -> None:
        server.max_length = len(prompt_ids(ASK)) + 3
        with closing(connect(server)) as backend:
            assert len(backend.generate(BASE, ASK).token_ids) == 3

    def test_a_prompt_that_does_not_fit_is_refused(self, server: StandIn) -> None:
        server.max_length = 4
        with (
            closing(connect(server)) as backend,
            pytest.raises(GenerationFailed, match="server takes 4; shorten it"),
        ):
            backend.generate(BASE, ASK)

    def test_messages_that_do_not_render_are_refused(self, server: StandIn) -> None:
        ask = GenerationRequest(messages=({"role": "user", "content": [{"type": "text"}]},))
        with (
            closing(connect(server)) as backend,
            pytest.raises(
                GenerationFailed, match=r"cannot be asked: message 0 \(user\) cannot be rendered"
            ),
        ):
            backend.generate(BASE, ask)

    def test_logprobs_that_are_not_finite_fail_the_request(self, server: StandIn) -> None:
        server.nan = {"served"}
        with (
            closing(connect(server)) as backend,
            pytest.raises(GenerationFailed, match="not finite; roll it back"),
        ):
            backend.generate(BASE, ASK)

    @pytest.mark.parametrize("how", ["given", "in the environment"])
    def test_the_api_key_is_sent(
        self, server: StandIn, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        server.key = "sesame"
        if how != "given":
            monkeypatch.setenv("VLLM_API_KEY", "sesame")
        with closing(connect(server, key="sesame" if how == "given" else None)) as backend:
            backend.generate(BASE, ASK)

    @pytest.mark.guarantee("vllm")
    def test_a_wrong_key_is_not_shown_in_the_error(self, server: StandIn) -> None:
        server.key = "sesame"
        with pytest.raises(ServerUnreachable, match="and its API key") as refused:
            connect(server, key="barley")
        assert "barley" not in str(refused.value)

    def test_a_key_from_a_file_may_end_with_its_newline(self, server: StandIn) -> None:
        server.key = "sesame"
        with closing(connect(server, key="sesame\n")) as backend:
            assert backend.generate(BASE, ASK).revision == BASE

    @pytest.mark.guarantee("vllm", "keys with line breaks, NUL, accents; passwords in addresses")
    @pytest.mark.parametrize("key", ["bar\nley", "bar\0ley", "b\u00e4rley"])
    def test_a_key_that_no_header_holds_is_refused_and_not_shown(
        self, server: StandIn, key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ConfigError, match=r"API key .* VLLM_API_KEY") as refused:
            connect(server, key=key)
        assert "ley" not in str(refused.value)
        with pytest.raises(ConfigError, match=r"'http://\[…\]@host' is not the address") as refused:
            VllmBackend(f"http://ana:{key}@host", model="tiny")
        assert "ley" not in str(refused.value)

    def test_a_closed_backend_refuses_requests(self, server: StandIn) -> None:
        backend = connect(server)
        backend.close()
        for call in (backend.list_loaded, lambda: backend.generate(BASE, ASK)):
            with pytest.raises(BackendClosed):
                call()
        with pytest.raises(BackendClosed):
            next(backend.stream(BASE, ASK))


class TestStreams:
    def test_a_stream_has_the_text_and_the_reply_of_generate(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server)) as backend:
            name = ready(backend, publish())
            *pieces, reply = backend.stream(name, ASK)
            assert reply == backend.generate(name, ASK)
        assert isinstance(reply, Reply)
        assert "".join(map(str, pieces)) == reply.message["content"]
        assert len(pieces) > 1

    def test_closing_a_stream_stops_the_server(self, server: StandIn) -> None:
        server.endless = True
        with closing(connect(server)) as backend:
            stream = backend.stream(BASE, ASK)
            next(stream)
            stream.close()
            assert server.aborted.wait(10)

    def test_a_stream_that_breaks_off_is_not_repeated(self, server: StandIn) -> None:
        server.breaks_off = True
        with (
            closing(connect(server, patience=5)) as backend,
            pytest.raises(ServerUnreachable, match="middle of an answer"),
        ):
            list(backend.stream(BASE, ASK))
        assert len(server.of("/v1/completions")) == 1

    def test_a_stream_that_has_not_begun_is_sent_to_another_server(
        self, server: StandIn, other: StandIn
    ) -> None:
        with closing(connect(server, other, patience=5)) as backend:
            server.broken = True
            for _ in range(4):
                assert isinstance(list(backend.stream(BASE, ASK))[-1], Reply)
        assert other.of("/v1/completions")


class TestLoading:
    def test_a_revision_is_loaded_by_its_id_from_the_registrys_folder(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server)) as backend:
            revision = publish()
            name = ready(backend, revision)
            assert server.loaded == {name: str(revision.path)}
            assert backend.list_loaded() == (name,)
            backend.unload(name)
            assert backend.list_loaded() == ()
            backend.unload(name)

    def test_adapters_at_is_the_folder_sent_to_the_server(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, adapters_at="/mnt/adapters")) as backend:
            name = ready(backend, publish())
        assert server.loaded == {name: f"/mnt/adapters/{name}"}

    def test_a_revision_that_another_process_loaded_is_used(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        revision = publish()
        with closing(connect(server)) as one, closing(connect(server)) as two:
            ready(one, revision)
            assert two.generate(ready(two, revision), ASK).revision == revision.revision_id

    def test_the_same_name_from_another_folder_is_refused(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        revision = publish()
        server.loaded[revision.revision_id] = "/elsewhere"
        with closing(connect(server)) as backend, pytest.raises(SwapFailed, match="already been"):
            backend.load(revision)

    def test_a_server_without_runtime_updating_is_refused_with_the_cure(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        server.updating = False
        with (
            closing(connect(server)) as backend,
            pytest.raises(SwapFailed, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ):
            backend.load(publish())

    def test_a_refusal_quotes_the_server(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        revision = publish()
        server.refused = {revision.revision_id}
        with closing(connect(server)) as backend:
            with pytest.raises(SwapFailed, match=r"LoRA rank 64 .*--max-lora-rank"):
                backend.load(revision)
            with pytest.raises(GenerationFailed, match="load it first"):
                backend.generate(revision.revision_id, ASK)

    def test_a_revision_that_one_server_refuses_is_unloaded_from_all(
        self, server: StandIn, other: StandIn, registry: Registry, publish: Callable[[], Revision]
    ) -> None:
        revision = publish()
        server.refused = {revision.revision_id}
        with closing(connect(server, other)) as backend, Router(registry, backend) as router:
            with pytest.raises(SwapFailed):
                router.activate(revision.revision_id)
            assert other.of("/v1/load_lora_adapter")
            assert other.loaded == {}

    @pytest.mark.guarantee("vllm")
    def test_a_revision_whose_files_change_while_the_server_reads_them_does_not_serve(
        self, server: StandIn, registry: Registry, publish: Callable[[], Revision], monkeypatch
    ) -> None:
        revision, load = publish(), Server.load

        def load_and_edit(self, name: str, path: str) -> None:
            load(self, name, path)
            file = revision.path / WEIGHTS_FILE
            file.write_bytes(file.read_bytes()[:-1] + b"!")

        monkeypatch.setattr(Server, "load", load_and_edit)
        with (
            closing(connect(server)) as backend,
            Router(registry, backend) as router,
            pytest.raises(InvalidAdapter, match=WEIGHTS_FILE),
        ):
            router.activate(revision.revision_id)
        assert server.loaded == {}
        reason = registry.get(revision.revision_id).quarantine_reason
        assert reason is not None
        assert "is not the file that was published" in reason

    def test_an_unload_that_failed_can_be_repeated(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, other)) as backend:
            name = ready(backend, publish())
            server.broken = True
            with pytest.raises(ServerUnreachable, match="server's log"):
                backend.unload(name)
            assert other.loaded == {}
            server.broken = False
            backend.unload(name)
            assert server.loaded == {}

    def test_a_revision_can_be_unloaded_at_one_place(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server)) as alone:
            (place,) = alone.capabilities().places
        with closing(connect(server, other)) as backend:
            name = ready(backend, publish())
            backend.unload(name, [place])
            assert server.loaded == {}
            assert other.loaded.keys() == {name}

    def test_a_server_that_missed_the_load_is_loaded_by_the_probe(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        revision = publish()
        with closing(connect(server, other)) as backend:
            server.broken = True
            backend.load(revision)
            server.broken = False
            backend.probe(revision.revision_id)
        assert server.loaded.keys() == {revision.revision_id}

    def test_a_revision_beyond_the_servers_room_is_refused(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        server.max_loras = 1
        with closing(connect(server)) as backend:
            name = ready(backend, publish())
            with pytest.raises(SwapFailed, match=f"keep 1 adapters, and have {name}"):
                backend.load(publish())
            assert backend.list_loaded() == (name,)

    def test_max_loras_overrides_the_room_that_the_server_reports(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        server.max_loras = 1
        with closing(connect(server, max_loras=2)) as backend:
            assert backend.capabilities().max_loaded == 2
            ready(backend, publish())
            ready(backend, publish())

    def test_a_probe_with_nan_fails(self, server: StandIn, publish: Callable[[], Revision]) -> None:
        revision = publish()
        server.nan = {revision.revision_id}
        with closing(connect(server)) as backend:
            backend.load(revision)
            with pytest.raises(SwapFailed, match=r"failed its probe .*not finite"):
                backend.probe(revision.revision_id)

    def test_a_revision_of_other_layers_is_refused_before_it_is_sent(
        self, server: StandIn, registry: Registry, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "wide", layers={LAYER: (4, 4)})
        base = read_base("tiny").identity
        revision = registry.publish(folder, parent=None, model=base, training={})
        with closing(connect(server)) as backend, pytest.raises(ValueError, match=LAYER):
            backend.validate(revision)
        assert server.loaded == {}


class TestTrouble:
    def test_no_server_at_the_address_is_an_error_with_the_cure(self, server: StandIn) -> None:
        server.stop()
        with pytest.raises(ServerUnreachable, match="check that vLLM runs there"):
            connect(server)

    @pytest.mark.parametrize(
        "urls",
        [
            (),
            ("127.0.0.1:8000",),
            ("http://127.0.0.1:80o0",),
            ("http://",),
            ("ftp://127.0.0.1:8000",),
            ("http://user:secret@127.0.0.1:8000",),
        ],
    )
    def test_an_invalid_address_is_refused_with_an_example(self, urls: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8000"):
            VllmBackend(*urls, model="tiny")

    def test_an_address_may_end_with_v1(self, server: StandIn) -> None:
        with closing(VllmBackend(f"{server.url}/v1/", model="tiny", patience=0)) as backend:
            assert backend.generate(BASE, ASK).revision == BASE

    def test_a_server_with_another_base_is_refused(self, server: StandIn, tmp_path: Path) -> None:
        server.root = str(shutil.copytree(ROOT, tmp_path / "edited"))
        connect(server).close()  # the same files, elsewhere
        (tmp_path / "edited" / "chat_template.jinja").write_text("{{ messages }}")
        with pytest.raises(WrongBase, match="give the base that it serves"):
            connect(server)

    def test_a_restarted_server_is_loaded_by_the_next_request(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, patience=5)) as backend:
            name = ready(backend, publish())
            expected = backend.generate(name, ASK)
            server.loaded = {}
            assert backend.generate(name, ASK) == expected
            server.loaded = {}
            assert list(backend.stream(name, ASK))[-1] == expected

    def test_concurrent_requests_load_a_restarted_server_once(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, patience=20)) as backend:
            name = ready(backend, publish())
            server.loaded = {}
            before = len(server.of("/v1/load_lora_adapter"))
            server.delay = 0.05
            with ThreadPoolExecutor(6) as pool:
                replies = list(pool.map(lambda _: backend.generate(name, ASK), range(6)))
        assert {reply.revision for reply in replies} == {name}
        assert len(server.of("/v1/load_lora_adapter")) - before == 1

    @pytest.mark.guarantee("vllm")
    def test_a_server_restarted_with_another_base_serves_nothing(
        self, server: StandIn, publish: Callable[[], Revision], tmp_path: Path
    ) -> None:
        with closing(connect(server, patience=1)) as backend:
            name = ready(backend, publish())
            server.loaded = {}
            server.root = str(shutil.copytree(ROOT, tmp_path / "other"))
            (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages }}")
            with pytest.raises(GenerationFailed, match="give the base that it serves"):
                backend.generate(name, ASK)
        assert server.loaded == {}

    def test_a_revision_that_is_loaded_again_is_probed_again(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, patience=5)) as backend:
            name = ready(backend, publish())
            server.loaded, server.nan = {}, {name}
            with pytest.raises(GenerationFailed, match=r"failed its probe .* finite"):
                backend.generate(name, ASK)

    def test_an_edited_revision_is_not_loaded_again(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, patience=5)) as backend:
            revision = publish()
            name = ready(backend, revision)
            server.loaded = {}
            file = revision.path / "adapter_model.safetensors"
            data = file.read_bytes()
            file.chmod(0o644)
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            with pytest.raises(GenerationFailed, match="not the file that was published"):
                backend.generate(name, ASK)
        assert server.loaded == {}

    def test_a_request_waits_for_a_server_that_restarts(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, patience=20)) as backend:
            name = ready(backend, publish())
            server.stop()
            back = threading.Timer(0.3, server.start)
            back.start()
            assert backend.generate(name, ASK).revision == name
            back.join()

    @pytest.mark.parametrize("how", ["gone", "broken"])
    def test_a_request_fails_when_patience_ends(self, server: StandIn, how: str) -> None:
        with closing(connect(server, patience=0.2)) as backend:
            if how == "gone":
                server.stop()
            server.broken = True
            with pytest.raises(ServerUnreachable, match=r"check that vLLM runs|server's log"):
                backend.generate(BASE, ASK)

    def test_a_request_that_gets_500_is_repeated_eight_times(self, server: StandIn) -> None:
        with closing(connect(server, patience=60)) as backend:
            backend.generate(BASE, ASK)
            server.broken, before = True, len(server.asked)
            with pytest.raises(ServerUnreachable, match="server's log"):
                backend.generate(BASE, ASK)
        assert len(server.asked) - before == 8

    def test_a_wrong_key_fails_at_once(self, server: StandIn) -> None:
        server.key = "sesame"
        with pytest.raises(ServerUnreachable, match="API key"):
            connect(server, key="barley", patience=60)
        assert len(server.asked) == 1

    def test_invalid_json_in_a_stream_fails_the_request(self, server: StandIn) -> None:
        server.garbage = True
        with (
            closing(connect(server)) as backend,
            pytest.raises(GenerationFailed, match="no token ids"),
        ):
            list(backend.stream(BASE, ASK))

    def test_a_forked_process_is_refused(self, server: StandIn) -> None:
        with closing(connect(server)) as backend:
            child = os.fork()
            if child == 0:
                try:
                    backend.generate(BASE, ASK)
                except BackendClosed:
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert backend.generate(BASE, ASK).revision == BASE

    def test_a_request_that_timed_out_is_not_repeated(self, server: StandIn) -> None:
        with closing(connect(server, patience=20, timeout=0.2)) as backend:
            server.delay, before = 1.0, len(server.asked)
            with pytest.raises(ServerUnreachable, match=r"no answer in 0\.2 seconds"):
                backend.generate(BASE, ASK)
        assert [path for path, _ in server.asked[before:]] == ["/v1/completions"]

    def test_another_kind_of_server_is_refused(self, server: StandIn) -> None:
        with pytest.raises(ServerUnreachable, match="check that the address"):
            VllmBackend(f"{server.url}/metrics", model="tiny", patience=60)


class TestSeveral:
    def test_all_servers_get_the_revision_and_a_share_of_requests(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        server.delay = other.delay = 0.05
        with closing(connect(server, other)) as backend:
            name = ready(backend, publish())
            asked = [threading.Thread(target=backend.generate, args=(name, ASK)) for _ in range(8)]
            for thread in asked:
                thread.start()
            for thread in asked:
                thread.join()
        assert server.loaded.keys() == other.loaded.keys() == {name}
        for one in (server, other):
            assert len(one.of("/v1/completions")) > 2

    def test_requests_go_to_another_server_when_one_dies(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, other, patience=10)) as backend:
            name = ready(backend, publish())
            server.stop()
            assert {backend.generate(name, ASK).revision for _ in range(5)} == {name}

    def test_requests_go_to_another_server_when_one_cannot_load_the_revision(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, other)) as backend:
            name = ready(backend, publish())
            server.loaded, server.refused = {}, {name}
            assert {backend.generate(name, ASK).revision for _ in range(5)} == {name}
        assert len(server.of("/v1/load_lora_adapter")) <= 3

    def test_a_server_that_missed_a_swap_is_loaded_later(
        self, server: StandIn, other: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server, other, patience=10)) as backend:
            server.stop()
            name = ready(backend, publish())
            server.start()
            other.stop()
            assert backend.generate(name, ASK).revision == name
            assert server.loaded.keys() == {name}


class TestPlaces:
    def test_a_server_is_the_same_place_under_any_local_name(
        self, server: StandIn, other: StandIn
    ) -> None:
        named = server.url.replace("127.0.0.1", "localhost")
        with (
            closing(connect(server, other)) as one,
            closing(VllmBackend(named, model="tiny")) as two,
        ):
            assert set(two.capabilities().places) < set(one.capabilities().places)
            assert len(one.capabilities().places) == 2
            assert one.capabilities().engine == "vllm"

    def test_a_revision_that_another_app_serves_is_not_unloaded(
        self, server: StandIn, other: StandIn, registry: Registry, publish: Callable[[], Revision]
    ) -> None:
        first, second = publish().revision_id, publish().revision_id
        with (
            closing(connect(server)) as small,
            closing(connect(server, other)) as large,
            Router(registry, small) as one,
            Router(registry, large) as two,
        ):
            one.activate(first)
            two.sync()
            two.activate(second)
            two.activate(publish().revision_id)
            assert first in server.loaded
            assert first not in other.loaded
            assert one.generate(ASK).revision == first

    def test_has_loaded_tells_what_a_place_has_loaded(
        self, server: StandIn, publish: Callable[[], Revision]
    ) -> None:
        with closing(connect(server)) as backend:
            name = publish().revision_id
            (place,) = backend.capabilities().places
            assert has_loaded(place, name) is False
            server.loaded[name] = "/there"
            assert has_loaded(place, name) is True
            server.loaded = {}
            server.broken = True
            assert has_loaded(place, name) is None
            server.stop()
            assert has_loaded(place, name) is False


class TestRouter:
    def test_a_rollback_loads_nothing(
        self, server: StandIn, registry: Registry, publish: Callable[[], Revision]
    ) -> None:
        first, second = publish().revision_id, publish().revision_id
        router = open_router(registry.home, server.url, model="tiny", follow=None)
        with router:
            router.activate(first)
            router.activate(second)
            assert router.generate(ASK).revision == second
            loads = len(server.of("/v1/load_lora_adapter"))
            router.rollback()
            assert router.generate(ASK).revision == first
            assert len(server.of("/v1/load_lora_adapter")) == loads

    @pytest.mark.parametrize("how", ["refused", "nan", "broken"])
    def test_after_a_failed_swap_the_old_revision_serves(
        self, server: StandIn, registry: Registry, publish: Callable[[], Revision], how: str
    ) -> None:
        first, second = publish().revision_id, publish().revision_id
        with closing(connect(server, patience=2)) as backend:
            router = Router(registry, backend)
            router.activate(first)
            if how == "broken":
                server.broken = True
            else:
                setattr(server, how, {second})
            with pytest.raises(SwapFailed, match=f"{first} still serves"):
                router.activate(second)
            server.broken = False
            assert router.generate(ASK).revision == first
            assert registry.state().live == first
            assert server.loaded.keys() == {first}


def test_the_stand_in_ends_its_answers() -> None:
    assert len(written("served", (1,))) == LENGTH + 1
