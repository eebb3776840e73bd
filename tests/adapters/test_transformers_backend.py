"""The in-process backend, compared with plain transformers and peft."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from served import LENGTH, PROMPTS, REVISIONS, Served, ask, blocked, get, make_adapter
from transformers import AutoTokenizer

from agentpref.errors import (
    BackendClosed,
    ConfigError,
    GenerationFailed,
    InvalidAdapter,
    InvalidMessage,
    SwapFailed,
    WrongBase,
)
from agentpref.learn.encode import encode
from agentpref.models import base as models_base
from agentpref.models import threads
from agentpref.models.adapter_files import AdapterFiles, read_adapter
from agentpref.models.base import load_base
from agentpref.record.messages import prompt_of
from agentpref.serve.backend import GenerationRequest, Reply, Revision, ServingBackend
from agentpref.serve.folders import MANIFEST_FILE, revision_id
from agentpref.serve.folders import encode as encode_manifest
from agentpref.serve.pins import find_pins
from agentpref.serve.registry import Registry
from agentpref.serve.router import Router
from agentpref.types import BASE, Completion, Example
from agentpref_adapters import _transformers_engine
from agentpref_adapters import transformers as module
from agentpref_adapters._transformers_engine import ActiveRequest
from agentpref_adapters.transformers import TransformersBackend, open_router

WEIGHTS = "adapter_model.safetensors"


def test_the_revisions_answer_differently_by_plain_peft(served: Served) -> None:
    for prompt in PROMPTS:
        answers = {served.expected[name, prompt] for name in (BASE, *served.names)}
        assert len(answers) == REVISIONS + 1


def test_the_engine_shares_the_cores_of_its_process_until_it_is_closed(
    random_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no more threads than there are cores, and watches who else needs them."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "thread_times", lambda: {1: threads.Times(1.0, 1.0)})
    inside: list[object] = []
    monkeypatch.setattr(threads, "spare_team", lambda: lambda: inside.append("yields"))
    counted = _transformers_engine._choose

    def count(*arguments: object) -> object:
        inside.append(torch.get_num_threads())
        return counted(*arguments)

    monkeypatch.setattr(_transformers_engine, "_choose", count)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with closing(TransformersBackend(str(random_base))) as backend:
            backend.generate(BASE, ask(PROMPTS[0]))
            assert "agentpref-cores" in {thread.name for thread in threading.enumerate()}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert "agentpref-cores" not in {thread.name for thread in threading.enumerate()}
    assert set(inside) == {"yields", 2}


def test_the_backend_implements_the_protocol(backend: TransformersBackend) -> None:
    assert isinstance(backend, ServingBackend)
    assert backend.capabilities().streaming


def test_each_revision_answers_as_plain_peft_does(
    served: Served, backend: TransformersBackend
) -> None:
    for index in range(REVISIONS):
        backend.load(get(served, index))
    assert backend.list_loaded() == served.names
    order = [(name, prompt) for name in (BASE, *served.names) for prompt in PROMPTS]
    random.Random(0).shuffle(order)
    for name, prompt in order:
        reply = backend.generate(name, ask(prompt))
        assert reply.token_ids == served.expected[name, prompt]
        assert reply.revision == name
        ended = reply.token_ids[-1] == backend.base.tokenizer.eos_token_id
        assert reply.finish_reason == ("stop" if ended else "length")


def test_the_tokens_of_a_reply_are_those_that_training_uses(backend: TransformersBackend) -> None:
    for tokens in (3, 24):
        asked = [ask(prompt, max_tokens=tokens) for prompt in PROMPTS]
        replies = [backend.generate(BASE, request) for request in asked]
        otherwise = Completion({"role": "assistant", "content": "otherwise"}, 0.0)
        pairs = [
            Example(
                example_id="id",
                namespace="default",
                created_at=0.0,
                prompt=prompt_of(request.messages),
                completions=(
                    Completion(reply.message, 1.0, token_ids=reply.token_ids),
                    otherwise,
                ),
                origin="comparison",
            )
            for request, reply in zip(asked, replies, strict=True)
        ]
        found = encode(pairs, backend.base.template, max_length=512)
        assert [row.completions[0] for row in found.rows] == [r.token_ids for r in replies]
        assert not found.retokenized


def test_after_unloading_the_base_answers_as_before(
    served: Served, backend: TransformersBackend
) -> None:
    layers = {name: type(module) for name, module in backend.base.model.named_modules()}
    for _ in range(2):
        backend.load(get(served, 0))
        backend.load(get(served, 1))
        backend.load(get(served, 1))
        backend.generate(served.names[0], ask("hello"))
        backend.unload(served.names[0])
        reply = backend.generate(served.names[1], ask("hello"))
        assert reply.token_ids == served.expected[served.names[1], "hello"]
        with pytest.raises(GenerationFailed, match="is not loaded"):
            backend.generate(served.names[0], ask("hello"))
        backend.unload(served.names[1])
        backend.unload(served.names[1])
        assert backend.list_loaded() == ()
        after = {name: type(module) for name, module in backend.base.model.named_modules()}
        assert after == layers
        assert backend.generate(BASE, ask("hello")).token_ids == served.expected[BASE, "hello"]


def test_waiting_requests_are_answered_in_one_batch(
    served: Served, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different lengths, limits and settings share a batch and do not see each other."""
    backend.load(get(served))
    name = served.names[0]
    alone = {prompt: backend.generate(name, ask(prompt)) for prompt in PROMPTS}
    sampled = ask("tide", temperature=1.0, seed=3)
    alone_sampled = backend.generate(name, sampled)
    widths: list[int] = []
    forward = backend.base.model.forward

    def watched(*args, **kwargs):
        widths.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(backend.base.model, "forward", watched)
    with ThreadPoolExecutor(8) as pool, blocked(backend) as waiting:
        futures = {p: pool.submit(backend.generate, name, ask(p)) for p in PROMPTS}
        short = pool.submit(backend.generate, name, ask("tide", max_tokens=2))
        chance = pool.submit(backend.generate, name, sampled)
        waiting(7)
    assert max(widths) == 7
    for prompt, future in futures.items():
        reply = future.result()
        assert reply.token_ids == alone[prompt].token_ids
        assert reply.logprobs == pytest.approx(alone[prompt].logprobs, abs=1e-4)
    assert short.result().token_ids == alone["tide"].token_ids[:2]
    assert short.result().finish_reason == "length"
    assert chance.result().token_ids == alone_sampled.token_ids


def test_logprobs_are_the_models_own(served: Served, backend: TransformersBackend) -> None:
    backend.load(get(served))
    tokenizer = backend.base.tokenizer
    for request in (ask("hello"), ask("hello", temperature=1.5, seed=1)):
        reply = backend.generate(served.names[0], request)
        assert len(reply.logprobs) == len(reply.token_ids)
        prompt = tokenizer.apply_chat_template(
            list(request.messages), add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([[*prompt, *reply.token_ids]])
        peft = PeftModel.from_pretrained(load_base(served.base).model, get(served).path)
        with torch.no_grad():
            scores = peft(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        told = scores.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        assert reply.logprobs == pytest.approx(told.tolist(), abs=1e-4)


def test_a_seed_repeats_a_sampled_answer(backend: TransformersBackend) -> None:
    answers = [
        backend.generate(BASE, ask("tide", temperature=2.0, seed=seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    unseeded = {backend.generate(BASE, ask("tide", temperature=5.0)).token_ids for _ in range(3)}
    assert len(unseeded) > 1


def test_a_tiny_top_p_is_greedy(served: Served, backend: TransformersBackend) -> None:
    reply = backend.generate(BASE, ask("tide", temperature=1.0, top_p=1e-6))
    assert reply.token_ids == served.expected[BASE, "tide"]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30])
def test_a_tiny_temperature_is_greedy(
    served: Served, backend: TransformersBackend, temperature: float
) -> None:
    reply = backend.generate(BASE, ask("tide", temperature=temperature))
    assert reply.token_ids == served.expected[BASE, "tide"]


def test_every_seed_and_temperature_that_a_request_takes_is_answered(
    backend: TransformersBackend,
) -> None:
    for seed in (-(2**63), -1, 0, 2**63 - 1):
        for temperature in (1.0, sys.float_info.max):
            request = ask("tide", temperature=temperature, seed=seed, max_tokens=2)
            assert backend.generate(BASE, request) == backend.generate(BASE, request)


@pytest.mark.parametrize("where", ["_sample", "take"])
def test_an_error_of_one_request_does_not_fail_the_others_of_its_batch(
    served: Served, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def broken(*args: object) -> int:
        raise RuntimeError("no such chance")

    def take(row: ActiveRequest, *args: object) -> None:
        broken() if row.generator else taken(row, *args)

    taken = ActiveRequest.take
    if where == "take":
        monkeypatch.setattr(ActiveRequest, "take", take)
    else:
        monkeypatch.setattr(_transformers_engine, "_sample", broken)
    with ThreadPoolExecutor(2) as pool, blocked(backend) as waiting:
        good = pool.submit(backend.generate, BASE, ask("tide"))
        bad = pool.submit(backend.generate, BASE, ask("hello", temperature=1.0))
        waiting(2)
    assert good.result().token_ids == served.expected[BASE, "tide"]
    assert isinstance(bad.exception(), GenerationFailed)
    assert "no such chance" in str(bad.exception())


def test_a_stop_string_ends_the_answer_and_is_cut_off(backend: TransformersBackend) -> None:
    whole = backend.generate(BASE, ask("tide")).message["content"]
    stop = whole[len(whole) // 2 :][:2]
    reply = backend.generate(BASE, ask("tide", stop=(stop, "never written")))
    assert reply.message["content"] == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"
    assert len(reply.token_ids) < LENGTH


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_a_stream_is_the_text_and_then_the_same_reply(
    served: Served, backend: TransformersBackend, stop: tuple[str, ...]
) -> None:
    backend.load(get(served))
    for prompt in PROMPTS:
        *pieces, reply = backend.stream(served.names[0], ask(prompt, stop=stop))
        assert isinstance(reply, Reply)
        assert reply.token_ids == served.expected[served.names[0], prompt]
        assert "".join(pieces) == reply.message["content"]
        again = backend.generate(served.names[0], ask(prompt, stop=stop))
        # All but the end of the prompt is known by now, and read in other products.
        assert again.logprobs == pytest.approx(reply.logprobs, abs=1e-4)
        assert replace(again, logprobs=()) == replace(reply, logprobs=())
        assert len(pieces) > 1


def test_a_closed_stream_stops_generating(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    forward = backend.base.model.forward
    left = threading.Event()

    def endless(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps > 8:
            left.wait()
        output = forward(*args, **kwargs)
        output.logits[..., backend.base.tokenizer.eos_token_id] = -math.inf
        return output

    monkeypatch.setattr(backend.base.model, "forward", endless)
    stream = backend.stream(BASE, ask("tide", max_tokens=100))
    next(stream)
    stream.close()
    left.set()
    backend.generate(BASE, ask("hello", max_tokens=1))
    assert steps < 20


def test_tools_are_rendered_and_tool_calls_are_read(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random model is made to write a call; what it is asked with must name the tool."""
    tokenizer = backend.base.tokenizer
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "tide"}}\n</tool_call>'
    script = [*tokenizer(call)["input_ids"], tokenizer.eos_token_id]
    prompts: list[str] = []
    forward = backend.base.model.forward

    def scripted(*args, **kwargs):
        output = forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        if ids.shape[1] > 1:
            prompts.append(tokenizer.decode(ids[0]))
            scripted.step = 0
        output.logits[:, -1, script[scripted.step]] = 1e4
        scripted.step += 1
        return output

    monkeypatch.setattr(backend.base.model, "forward", scripted)
    tool = {"type": "function", "function": {"name": "search", "parameters": {}}}
    reply = backend.generate(BASE, ask("tide", tools=(tool,), max_tokens=200))
    assert '"name": "search"' in prompts[0]
    assert reply.finish_reason == "stop"
    assert reply.message["content"] == ""
    (called,) = reply.message["tool_calls"]
    assert called["function"]["name"] == "search"
    assert json.loads(called["function"]["arguments"]) == {"query": "tide"}


def test_an_error_in_the_engine_reaches_every_caller_and_leaves_it_usable(
    served: Served, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.load(get(served))
    layer = backend.base.model.model.layers[1]
    forward = layer.forward

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer, "forward", broken)
    with ThreadPoolExecutor(4) as pool, blocked(backend) as waiting:
        futures = [pool.submit(backend.generate, served.names[0], ask(p)) for p in PROMPTS[:4]]
        waiting(4)
    errors = [future.exception() for future in futures]
    assert all(isinstance(error, GenerationFailed) for error in errors)
    assert all("out of memory" in str(error) for error in errors)
    assert len(set(map(id, errors))) == 4, "each thread raises an error of its own"
    assert isinstance(errors[0].__cause__, RuntimeError)
    with pytest.raises(GenerationFailed, match="out of memory"):
        list(backend.stream(BASE, ask("hello")))
    monkeypatch.setattr(layer, "forward", forward)
    for name in (served.names[0], BASE):
        assert backend.generate(name, ask("hello")).token_ids == served.expected[name, "hello"]


def test_a_prompt_that_cannot_be_answered_is_refused(backend: TransformersBackend) -> None:
    with pytest.raises(GenerationFailed, match="the model takes 512; shorten it"):
        backend.generate(BASE, ask("tide " * 600))
    with pytest.raises(GenerationFailed, match="cannot be asked"):
        backend.generate(
            BASE, GenerationRequest(({"role": "assistant", "content": "", "tool_calls": 5},))
        )
    with pytest.raises(InvalidMessage):
        GenerationRequest(messages=())
    assert backend.generate(BASE, ask("tide")).finish_reason


def test_an_answer_ends_at_the_end_of_the_context(backend: TransformersBackend) -> None:
    prompt = "tide " * 240
    reply = backend.generate(BASE, ask(prompt, max_tokens=500))
    encoded = backend._encode(ask(prompt))
    assert len(encoded) + len(reply.token_ids) <= 512


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ask("hi", **settings)


def spoil(revision: Revision, change) -> None:
    file = revision.path / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def as_published(revision: Revision) -> Revision:
    """The revision as if its files had been published as they are now: past the digests."""
    files = {**revision.manifest["files"], **read_adapter(revision.path).digests}
    manifest = {**revision.manifest, "files": files}
    name = revision_id(int(revision.revision_id.split("-")[1]), files)
    folder = revision.path.rename(revision.path.with_name(name))
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
    return replace(revision, revision_id=name, path=folder, manifest=manifest)


@pytest.mark.parametrize("with_another", [False, True])
def test_a_failed_load_leaves_nothing_behind(
    served: Served, registry: Registry, backend: TransformersBackend, with_another: bool
) -> None:
    """Straight to the engine, past every check, as the first adapter and as the second."""
    if with_another:
        backend.load(get(served, 1))
    loaded = backend.list_loaded()
    layers = {name: type(module) for name, module in backend.base.model.named_modules()}
    parameters = dict(backend.base.model.named_parameters()).keys()
    broken = registry.get(served.names[0])
    spoil(broken, lambda t: t.update({k: v[:4] for k, v in t.items() if "lora_A" in k}))
    broken = as_published(broken)
    with pytest.raises(SwapFailed, match=f"{broken.revision_id} could not be loaded"):
        backend.load(broken)
    assert backend.list_loaded() == loaded
    assert layers == {n: type(m) for n, m in backend.base.model.named_modules()}
    assert parameters == dict(backend.base.model.named_parameters()).keys()
    for name in (BASE, *loaded):
        assert backend.generate(name, ask("hello")).token_ids == served.expected[name, "hello"]
    backend.load(get(served, 0))
    name = served.names[0]
    assert backend.generate(name, ask("hello")).token_ids == served.expected[name, "hello"]


def test_a_load_draws_no_random_numbers(served: Served, backend: TransformersBackend) -> None:
    before = torch.random.get_rng_state()
    backend.load(get(served, 0))
    backend.load(get(served, 1))
    backend.generate(served.names[1], ask("hi", temperature=1.0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_that_are_not_finite_fail_the_probe(
    served: Served, registry: Registry, backend: TransformersBackend
) -> None:
    broken = registry.get(served.names[0])
    spoil(broken, lambda t: t[next(k for k in t if "lora_B" in k)].fill_(math.nan))
    broken = as_published(broken)
    backend.load(broken)
    with pytest.raises(SwapFailed, match="failed its probe"):
        backend.probe(broken.revision_id)
    assert backend.probe(BASE).revision == BASE
    for request in (ask("hi"), ask("hi", temperature=1.0)):
        with pytest.raises(GenerationFailed, match="logprob of nan"):
            backend.generate(broken.revision_id, request)


def test_validate_checks_a_revision_against_the_model(
    served: Served, registry: Registry, backend: TransformersBackend, tmp_path: Path
) -> None:
    revision = get(served)
    backend.validate(revision)
    for key in ("digest", "template_digest"):
        base = {**backend.base.identity, key: "0" * 64}
        other = registry.publish(revision.path, parent=None, model=base, training={})
        with pytest.raises(WrongBase):
            backend.validate(other)
    wide = make_adapter(served.base, tmp_path / "wide", seed=9)
    tensors = load_file(wide / WEIGHTS)
    key = next(k for k in tensors if k.endswith("q_proj.lora_B.weight"))
    tensors[key] = torch.cat([tensors[key]] * 2)
    save_file(tensors, wide / WEIGHTS)
    published = registry.publish(wide, parent=None, model=backend.base.identity, training={})
    with pytest.raises(InvalidAdapter, match="q_proj adapts a layer of"):
        backend.validate(published)


def test_importing_the_module_imports_no_torch() -> None:
    code = (
        "import sys, agentpref_adapters.transformers;"
        "print({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_closed_backend_refuses_requests(served: Served) -> None:
    backend = TransformersBackend(served.base, precision="float32")
    backend.close()
    backend.close()
    for call in (
        lambda: backend.generate(BASE, ask("hi")),
        lambda: backend.load(get(served)),
        lambda: next(backend.stream(BASE, ask("hi"))),
    ):
        with pytest.raises(BackendClosed):
            call()


def test_a_prompt_with_a_token_that_has_no_embedding_is_refused(
    served: Served, tmp_path: Path
) -> None:
    """Gemma 3 1B has such a token, which a user may spell."""
    folder = shutil.copytree(served.base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    backend = TransformersBackend(str(folder), precision="float32")
    with pytest.raises(GenerationFailed, match=r"writes token 400.*leave '<\|image\|>' out"):
        backend.generate(BASE, ask("What is <|image|>?"))
    assert backend.generate(BASE, ask("hello")).token_ids == served.expected[BASE, "hello"]
    backend.close()


@pytest.mark.guarantee("serving")
def test_every_reply_during_swaps_comes_from_the_revision_it_names(
    served: Served, registry: Registry, backend: TransformersBackend
) -> None:
    """The guarantee: threads generate, streaming or not, while revisions come and go."""
    router = Router(registry, backend)
    done = threading.Event()

    def client(number: int) -> list[tuple[str, Reply]]:
        source, replies = random.Random(number), []
        while not done.is_set():
            prompt = source.choice(PROMPTS)
            if source.random() < 0.5:
                reply = router.generate(ask(prompt), thread_id=f"thread-{number}")
            else:
                *pieces, reply = router.stream(ask(prompt), thread_id=f"thread-{number}")
                assert "".join(pieces) == reply.message["content"]
            replies.append((prompt, reply))
        return replies

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            for turn in range(24):
                name = served.names[turn % REVISIONS]
                router.activate(name)
                assert router.generate(ask("tide")).revision == name
                if turn % 6 == 2:
                    router.canary(served.names[(turn + 1) % REVISIONS], 0.5)
                if turn % 6 == 4:
                    router.rollback()
        finally:
            done.set()
        replies = [reply for one in clients for reply in one.result()]
    for prompt, reply in replies:
        assert reply.token_ids == served.expected[reply.revision, prompt]
    assert len({reply.revision for _, reply in replies}) > 2, "swaps happened under load"
    assert len(backend.list_loaded()) <= 3, "live, the one before, and a canary"


def test_a_live_revision_with_edited_files_is_refused(served: Served, registry: Registry) -> None:
    registry.promote(served.names[0])
    spoil(registry.get(served.names[0]), lambda t: t[next(iter(t))].add_(1))
    with pytest.raises(InvalidAdapter, match=WEIGHTS):
        open_router(registry.home.path, served.base, precision="float32")


def test_open_router_serves_the_live_revision_and_closes_its_backend(
    served: Served, registry: Registry
) -> None:
    registry.promote(served.names[2])
    with open_router(registry.home.path, served.base, precision="float32") as router:
        reply = router.generate(ask("hello"))
    with pytest.raises(BackendClosed):
        router.backend.generate(BASE, ask("hello"))
    assert find_pins(registry.home.pins) == []
    assert reply.revision == served.names[2]
    assert reply.token_ids == served.expected[served.names[2], "hello"]


def test_open_router_follows_promotions_of_other_processes(
    served: Served, registry: Registry
) -> None:
    with open_router(registry.home, served.base, precision="float32", follow=0.01) as router:
        registry.promote(served.names[1])
        for _ in range(6000):
            reply = router.generate(ask("hello", max_tokens=1))
            if reply.revision == served.names[1]:
                break
        assert reply.revision == served.names[1]
    with open_router(registry.home, served.base, precision="float32", follow=None) as router:
        registry.promote(served.names[0])
        assert router.generate(ask("hello", max_tokens=1)).revision == served.names[1]
        router.sync()
        assert router.generate(ask("hello", max_tokens=1)).revision == served.names[0]
    with pytest.raises(ConfigError, match="above 0"):
        open_router(registry.home, served.base, precision="float32", follow=0)
    assert find_pins(registry.home.pins) == []


def wipe(file: Path) -> None:
    """Overwrite a file with zeros where it is, and then cut it off."""
    size = file.stat().st_size
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.write(bytes(size))
        stream.flush()
        stream.truncate(1)


@pytest.mark.guarantee("serving")
def test_a_loaded_revision_answers_as_before_when_its_file_is_overwritten_and_truncated(
    served: Served, tmp_path: Path
) -> None:
    home = shutil.copytree(served.home, tmp_path / "home")
    with open_router(home, served.base, precision="float32", follow=None) as router:
        router.activate(served.names[0])
        expected = router.generate(ask(PROMPTS[0])).token_ids
        wipe(router.registry.get(served.names[0]).path / WEIGHTS)
        assert router.generate(ask(PROMPTS[0])).token_ids == expected
        assert expected == served.expected[served.names[0], PROMPTS[0]]


@pytest.mark.guarantee("serving")
def test_weights_that_change_between_check_and_load_are_not_loaded(
    served: Served, backend: TransformersBackend, tmp_path: Path
) -> None:
    registry = Registry(shutil.copytree(served.home, tmp_path / "home"))
    revision, other = (registry.get(name) for name in served.names[:2])
    backend.validate(revision)
    (revision.path / WEIGHTS).chmod(0o644)
    shutil.copyfile(other.path / WEIGHTS, revision.path / WEIGHTS)
    with pytest.raises(InvalidAdapter, match="is not the file that was published"):
        backend.load(revision)
    assert revision.revision_id not in backend.list_loaded()


def test_weights_that_change_after_the_last_check_have_no_effect(
    served: Served,
    backend: TransformersBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry(shutil.copytree(served.home, tmp_path / "home"))
    revision, check = registry.get(served.names[0]), module.check_published

    def check_and_wipe(revision: Revision) -> AdapterFiles:
        files = check(revision)
        wipe(revision.path / WEIGHTS)
        return files

    monkeypatch.setattr(module, "check_published", check_and_wipe)
    backend.load(revision)
    reply = backend.generate(revision.revision_id, ask(PROMPTS[0]))
    assert reply.token_ids == served.expected[served.names[0], PROMPTS[0]]


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_model_that_is_named_is_held_as_an_update_holds_it(
    random_base: Path, monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(models_base, "native_bfloat16", lambda *, gpu: native)
    with closing(TransformersBackend(str(random_base))) as backend:
        assert backend.base.precision == expected
        assert backend.generate(BASE, ask("tide")).token_ids
    with closing(TransformersBackend(str(random_base), precision="float32")) as backend:
        assert backend.base.precision == "float32"
    with pytest.raises(ConfigError, match="a loaded model has its precision; give it to load_base"):
        TransformersBackend(backend.base, precision="bfloat16")


def test_a_precision_that_is_none_is_named(random_base: Path) -> None:
    with pytest.raises(
        ConfigError, match="precision is 'float8', but must be one of auto, float32"
    ):
        TransformersBackend(str(random_base), precision="float8")  # type: ignore[arg-type]


def test_a_router_holds_its_model_as_it_is_told(served: Served) -> None:
    with open_router(served.home, served.base, precision="bfloat16", follow=None) as router:
        assert router.backend.base.precision == "bfloat16"  # type: ignore[attr-defined]
