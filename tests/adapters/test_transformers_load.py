"""The in-process backend with many requests at once: they join and leave without mixing."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from served import PROMPTS, REVISIONS, Served, ask, blocked, get, make_home
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MistralConfig, Phi3Config

from agentpref.errors import GenerationFailed
from agentpref.serve.backend import Reply
from agentpref.serve.registry import Registry
from agentpref.types import BASE
from agentpref_adapters._transformers_engine import _Batch
from agentpref_adapters.transformers import TransformersBackend, open_router

LONG = 300


class Watched:
    """Counts the rows of each forward pass, and lets a test stop the engine between two."""

    def __init__(self, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.go = threading.Event()
        self.go.set()
        model = backend.base.model
        forward = model.forward
        endless = backend.base.tokenizer.eos_token_id

        def watched(*args, **kwargs):
            self.go.wait()
            self.rows.append(len(kwargs["input_ids"]))
            output = forward(*args, **kwargs)
            output.logits[..., endless] = -torch.inf
            return output

        monkeypatch.setattr(model, "forward", watched)

    def until(self, holds: Callable[[], bool]) -> None:
        for _ in range(60_000):
            if holds():
                return
            threading.Event().wait(0.001)
        pytest.fail("it did not come about within a minute")

    def until_idle(self, backend: TransformersBackend) -> None:
        """Wait until nobody is answered, long before whoever left would have been."""
        self.until(lambda: not backend._thread._engine.has_work)


@pytest.fixture
def watched(backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(backend, monkeypatch)


@pytest.mark.guarantee("serving")
def test_a_short_request_does_not_wait_for_the_end_of_a_long_one(
    backend: TransformersBackend, watched: Watched
) -> None:
    long = backend.stream(BASE, ask("tide", max_tokens=LONG))
    next(long)
    backend.generate(BASE, ask("hello", max_tokens=3))
    assert 2 in watched.rows, "they were in one batch"
    assert len(watched.rows) < LONG, "the long one is not at its end"
    *_, reply = long
    assert len(reply.token_ids) == LONG
    assert watched.rows[-1] == 1, "who has ended is no longer in the batch"


def test_requests_of_all_revisions_share_a_batch_without_mixing(
    served: Served, backend: TransformersBackend
) -> None:
    """At random moments, so that rows of all lengths join, leave and shift."""
    for index in range(REVISIONS):
        backend.load(get(served, index))
    names = (BASE, *served.names)

    def client(number: int) -> None:
        source = random.Random(number)
        for _ in range(12):
            name, prompt = source.choice(names), source.choice(PROMPTS)
            length = source.randint(1, 10)
            reply = backend.generate(name, ask(prompt, max_tokens=length))
            assert reply.token_ids == served.expected[name, prompt][:length]

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(client, number) for number in range(6)]:
            done.result()


def test_an_unloaded_revision_still_answers_its_active_requests(
    served: Served, backend: TransformersBackend
) -> None:
    """Not even unloading what it uses: it keeps its matrices, and they are freed after it."""
    name, prompt = served.names[0], PROMPTS[1]
    backend.load(get(served, 0))
    adapter = weakref.ref(backend._adapters[name])
    with ThreadPoolExecutor(1) as pool, blocked(backend) as waiting:
        reply = pool.submit(backend.generate, name, ask(prompt))
        waiting(1)
        backend.load(get(served, 1))
        backend.unload(name)
        with pytest.raises(GenerationFailed, match="is not loaded"):
            backend.generate(name, ask(prompt))
    assert reply.result().token_ids == served.expected[name, prompt]
    backend.generate(BASE, ask("hello", max_tokens=1))
    del reply
    gc.collect()
    assert adapter() is None


def test_requests_beyond_max_batch_wait_and_are_answered(served: Served) -> None:
    backend = TransformersBackend(served.base, max_batch=2, precision="float32")
    with ThreadPoolExecutor(6) as pool:
        replies = {p: pool.submit(backend.generate, BASE, ask(p)) for p in PROMPTS}
        for prompt, reply in replies.items():
            assert reply.result().token_ids == served.expected[BASE, prompt]
    backend.close()


def test_an_error_in_the_prompt_of_one_request_does_not_fail_the_others(
    served: Served, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backend.base.model
    forward = model.forward
    failing = threading.Event()

    def broken(*args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1 and failing.is_set():
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", broken)
    stream = backend.stream(BASE, ask("tide"))
    next(stream)
    failing.set()
    with pytest.raises(GenerationFailed, match="out of memory"):
        backend.generate(BASE, ask("hello"))
    *_, reply = stream
    assert reply.token_ids == served.expected[BASE, "tide"]


@pytest.mark.parametrize("step", ["join", "keep"])
def test_an_error_while_caches_are_copied_fails_the_batch_and_the_backend_stays_usable(
    served: Served, backend: TransformersBackend, watched: Watched, step: str
) -> None:
    """There, as in the model, memory runs out."""
    long = backend.stream(BASE, ask("tide", max_tokens=LONG))
    next(long)
    with pytest.MonkeyPatch.context() as patched:

        def broken(*args: object) -> None:
            raise RuntimeError("out of memory")

        patched.setattr(_Batch, step, broken)
        with suppress(GenerationFailed):  # one that has its answer before the caches are cut
            backend.generate(BASE, ask("hello", max_tokens=3))
        with pytest.raises(GenerationFailed, match="out of memory"):
            list(long)
    watched.until_idle(backend)
    assert len(watched.rows) < LONG
    assert len(backend.generate(BASE, ask("tide", max_tokens=5)).token_ids) == 5


def test_an_error_before_joining_a_batch_fails_only_the_new_request(
    served: Served, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the batch that it would have joined, which was not touched."""
    stream = backend.stream(BASE, ask("tide"))
    next(stream)
    tensor = torch.tensor

    def broken(values: object, **settings: object) -> torch.Tensor:
        if isinstance(values, list) and isinstance(values[0], list):
            raise RuntimeError("out of memory")
        return tensor(values, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", broken)
        with pytest.raises(GenerationFailed, match="out of memory"):
            backend.generate(BASE, ask("hello"))
    *_, reply = stream
    assert reply.token_ids == served.expected[BASE, "tide"]


def test_ctrl_c_while_waiting_stops_the_request(
    backend: TransformersBackend, watched: Watched
) -> None:
    def interrupt() -> None:
        watched.until(lambda: len(watched.rows) > 2)
        watched.go.clear()  # or the answer is at its end before a busy machine has told us
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        backend.generate(BASE, ask("tide", max_tokens=LONG))
    watched.go.set()
    watched.until_idle(backend)
    assert len(watched.rows) < LONG


def test_closing_a_stream_stops_its_request(backend: TransformersBackend, watched: Watched) -> None:
    streams = [backend.stream(BASE, ask(p, max_tokens=LONG)) for p in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    streams[0].close()  # type: ignore[attr-defined]
    alone = len(watched.rows)
    watched.until(lambda: watched.rows[alone:].count(1) > 2)
    streams[1].close()  # type: ignore[attr-defined]
    watched.until_idle(backend)
    assert len(watched.rows) < LONG


def test_a_request_abandoned_while_waiting_is_never_started(
    backend: TransformersBackend, watched: Watched
) -> None:
    watched.go.clear()
    first = threading.Thread(target=backend.generate, args=(BASE, ask("tide", max_tokens=2)))
    first.start()
    row = backend._submit(BASE, ask("hello", max_tokens=LONG), streaming=True)
    results = row.results()
    row.done = True
    watched.go.set()
    first.join()
    watched.until_idle(backend)
    assert len(watched.rows) == 2
    del results


def test_closing_the_backend_finishes_active_requests(
    served: Served, backend: TransformersBackend
) -> None:
    stream = backend.stream(BASE, ask("tide"))
    next(stream)
    backend.close()
    *_, reply = stream
    assert isinstance(reply, Reply)
    assert reply.token_ids == served.expected[BASE, "tide"]


TRAINING = """
import sys
import agentpref

with agentpref.Log(sys.argv[1]) as log:
    for number in range(40):
        asked = [{"role": "user", "content": f"question {number}"}]
        yes, no = log.record(asked, "yes"), log.record(asked, "no")
        log.compare(yes, no, winner="a")
print("training", flush=True)
print(agentpref.update(sys.argv[1], model=sys.argv[2], promote=False).verdict)
"""


@pytest.mark.slow
def test_training_in_another_process_of_the_same_home_does_not_disturb_serving(
    served: Served, registry: Registry
) -> None:
    registry.promote(served.names[0])
    command = [sys.executable, "-W", "ignore", "-c", TRAINING, str(registry.home.path), served.base]
    with (
        open_router(registry.home, served.base, precision="float32") as router,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as training,
    ):
        while training.poll() is None:
            for prompt in PROMPTS:
                reply = router.generate(ask(prompt))
                assert reply.token_ids == served.expected[served.names[0], prompt]
        assert training.stdout is not None
        assert training.stdout.read().split()[1] in ("passed", "refused", "insufficient")


SMALL = {
    "gpt2": GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, bos_token_id=None
    ),
    "mistral with a sliding window": MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        initializer_range=0.2,
    ),
    "phi3 with longrope": Phi3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        original_max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0 + number for number in range(8)],
            "original_max_position_embeddings": 64,
        },
    ),
}


def small_base(kind: str, random_base: Path, folder: Path) -> str:
    """A random model of another kind, with the tokenizer of the shared one."""
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.save_pretrained(folder)
    config = SMALL[kind]
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def test_ended_requests_of_a_batch_that_cannot_be_cut_make_room_for_others(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base("mistral with a sliding window", random_base, tmp_path / "base")
    backend = TransformersBackend(base, max_batch=2, precision="float32")
    watched = Watched(backend, monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        with blocked(backend) as waiting:
            long = pool.submit(backend.generate, BASE, ask("tide", max_tokens=LONG))
            short = pool.submit(backend.generate, BASE, ask("hello", max_tokens=1))
            waiting(2)
        short.result()
        backend.generate(BASE, ask("late", max_tokens=1))
        assert not long.done()
        assert len(watched.rows) < LONG
        assert len(long.result().token_ids) == LONG
    backend.close()


def test_a_long_request_does_not_change_the_answers_to_short_ones_under_longrope(
    random_base: Path, tmp_path: Path
) -> None:
    """Longrope has other factors beyond a length, and transformers one set for a whole batch."""
    base = small_base("phi3 with longrope", random_base, tmp_path / "base")
    backend = TransformersBackend(base, precision="float32")
    short, other, long = ask("tide"), ask("hello"), ask("tide tables " * 50, max_tokens=12)
    asked = (short, long, other)
    assert len(backend._encode(short)[0]) + 10 < 64 < len(backend._encode(long)[0])
    alone = [backend.generate(BASE, request) for request in asked]
    with ThreadPoolExecutor(3) as pool:
        with blocked(backend) as waiting:
            together = [pool.submit(backend.generate, BASE, request) for request in asked]
            waiting(3)
        for before, reply in zip(alone, together, strict=True):
            assert reply.result().token_ids == before.token_ids
    backend.close()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft's, of GPT-2
@pytest.mark.parametrize("kind", SMALL)
def test_other_kinds_of_model_answer_as_plain_peft_does(
    kind: str, random_base: Path, tmp_path: Path
) -> None:
    """GPT-2 stores its weights the other way round; a sliding window's cache cannot be joined."""
    served = make_home(small_base(kind, random_base, tmp_path / "base"), tmp_path)
    backend = TransformersBackend(served.base, precision="float32")
    for index in range(REVISIONS):
        backend.load(get(served, index))
    order = [(name, prompt) for name in (BASE, *served.names) for prompt in PROMPTS]
    with ThreadPoolExecutor(5) as pool:
        replies = pool.map(lambda case: backend.generate(case[0], ask(case[1])), order)
        for case, reply in zip(order, replies, strict=True):
            assert reply.token_ids == served.expected[case]
    backend.close()
