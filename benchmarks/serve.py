"""Serving inside the process against ``generate`` on a merged model: tokens a second, first token.

    python -m benchmarks.serve                     SmolLM2-135M-Instruct, as `real_model` fetches it
    python -m benchmarks.serve --model FOLDER --rounds 3

Answers to 1, 4 and 16 requests that share a system prompt, each with other questions, of a revision
with an adapter (ours) and of the merged model (``generate``, which reads all prompts in one pass
and has nothing to choose between). Rounds are interleaved, and medians are shown with the processor
seconds of a round. Then the first token of a short request alone, and beside three long answers.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from agentpref.config import Precision
from agentpref.home import Home
from agentpref.models.base import BaseModel, load_base
from agentpref.models.threads import disband
from agentpref.models.tokenizer import encode_prompt
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.registry import Registry
from agentpref.types import Message, Prompt
from agentpref_adapters.transformers import TransformersBackend
from agentpref_cli.demo.real_model import fetch
from benchmarks._report import at_least, at_most, print_report
from benchmarks.swap.stage import adapter_of

TOKENS, COUNTS, LONG_TOKENS = 48, (1, 4, 16), 400
QUESTIONS = Path(__file__).parent / "data" / "everyday_questions.txt"
SYSTEM = "You answer for a shop. " + " ".join(
    f"Rule {number}: be brief, and be kind to people who ask about orders." for number in range(14)
)


def main() -> None:
    """Measure, and print the table and the report."""
    options = _options()
    model = str(options.model or fetch(say=print))
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    first: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        arms = _arms(model, Path(folder))
        questions = _Questions()
        for arm, (ask, _) in arms.items():  # the system prompt has been seen, and all is warm
            ask(questions.take(2))
            print(f"{arm} is ready", flush=True)
        for _ in range(options.rounds):
            for count in COUNTS:
                asked = questions.take(count)
                for arm, (ask, _) in arms.items():
                    began, cpu = time.monotonic(), time.process_time()
                    written = ask(asked)
                    seconds[arm, count].append((time.monotonic() - began) / written)
                    spent[arm, count].append(time.process_time() - cpu)
            for arm, (_, backend) in arms.items():
                if backend is not None:
                    for name, value in _first_token(backend, questions).items():
                        first[f"{arm}, {name}"].append(value)
        for _, backend in arms.values():
            if backend is not None:
                backend.close()
    rates = {key: 1 / statistics.median(each) for key, each in seconds.items()}
    print("| requests | " + " | ".join(arms) + " |\n|---|" + "---|" * len(arms))
    for count in COUNTS:
        cells = (
            f"{rates[arm, count]:.1f} tokens/s, {statistics.median(spent[arm, count]):.1f} s CPU"
            for arm in arms
        )
        print(f"| {count} | " + " | ".join(cells) + " |")
    waits = {name: statistics.median(each) for name, each in first.items()}
    ratios = {n: rates["bfloat16", n] / rates["generate, bfloat16", n] for n in COUNTS}
    print_report(
        "serve",
        {
            **{f"{arm}, {count}: tokens/s": round(rate, 1) for (arm, count), rate in rates.items()},
            **{f"{name}: seconds": round(value, 3) for name, value in waits.items()},
        },
        [
            at_least("one request, of merged generate", ratios[1], 0.9),
            *(at_least(f"{n} requests, of merged generate", ratios[n], 1.3) for n in COUNTS[1:]),
            at_most(
                "first token beside three long answers, of alone",
                waits["bfloat16, beside three"] / waits["bfloat16, alone"],
                1.5,
            ),
        ],
    )


class _Questions:
    """Requests that nobody has made before."""

    def __init__(self) -> None:
        self._lines: Iterator[str] = iter(QUESTIONS.read_text(encoding="utf-8").splitlines())

    def take(self, count: int, *, tokens: int = TOKENS) -> list[GenerationRequest]:
        """Some requests with the system prompt."""
        found = []
        for _ in range(count):
            asked: tuple[Message, ...] = (
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": next(self._lines)},
            )
            found.append(GenerationRequest(asked, max_tokens=tokens))
        return found


def _arms(model: str, folder: Path) -> dict[str, tuple[Callable[..., int], Any]]:
    """What answers requests and says how many tokens it wrote, and the backend if it is one."""
    arms: dict[str, tuple[Callable[..., int], Any]] = {}
    home = Home.create(folder / "home")
    adapter = adapter_of(model, folder / "adapter", 0)
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    for precision in precisions:
        backend = TransformersBackend(model, precision=precision)
        if not (published := Registry(home).list()):
            published = [
                Registry(home).publish(
                    adapter, parent=None, model=backend.base.identity, training={}
                )
            ]
        revision = published[0]
        backend.validate(revision)
        backend.load(revision)
        arms[precision] = (_Ours(backend, revision.revision_id), backend)
    for precision in precisions:
        base = load_base(model, precision=precision)
        arms[f"generate, {precision}"] = (_Merged(base), None)
    disband()
    return arms


class _Ours:
    def __init__(self, backend: TransformersBackend, revision: str) -> None:
        self._backend, self._revision = backend, revision

    def __call__(self, requests: list[GenerationRequest]) -> int:
        with ThreadPoolExecutor(len(requests)) as pool:
            replies = pool.map(lambda one: self._backend.generate(self._revision, one), requests)
            return sum(len(reply.token_ids) for reply in replies)


class _Merged:
    """A merged adapter changes numbers and no work, so the base stands for the merged model."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    def __call__(self, requests: list[GenerationRequest]) -> int:
        import torch

        prompts = [encode_prompt(Prompt("", one.messages), self._base.template) for one in requests]
        wide, pad = max(map(len, prompts)), int(self._base.tokenizer.pad_token_id or 0)
        gaps = [wide - len(prompt) for prompt in prompts]
        ids = [[pad] * gap + [*prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
        mask = [[0] * gap + [1] * (wide - gap) for gap in gaps]
        model: Any = self._base.model
        out = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=requests[0].max_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        disband()  # so that it stands in nobody's way
        end = model.generation_config.eos_token_id
        ends = {*end} if isinstance(end, list) else {end}
        rows: list[list[int]] = out[:, wide:].tolist()
        return sum(next((n + 1 for n, t in enumerate(row) if t in ends), len(row)) for row in rows)


def _first_token(backend: TransformersBackend, questions: _Questions) -> dict[str, float]:
    """Seconds to the first piece of a short answer alone, and beside three long ones."""
    revision = backend.list_loaded()[0]

    def wait() -> float:
        (request,) = questions.take(1, tokens=8)
        began = time.monotonic()
        stream = backend.stream(revision, request)
        next(stream)
        taken = time.monotonic() - began
        for _ in stream:
            pass
        return taken

    alone = statistics.median(wait() for _ in range(3))
    begun, over = threading.Barrier(4), threading.Event()

    def write(request: GenerationRequest) -> None:
        stream = backend.stream(revision, request)
        next(stream)
        begun.wait()
        for _ in stream:
            if over.is_set():
                break

    long = questions.take(3, tokens=LONG_TOKENS)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(write, request) for request in long]
        begun.wait()
        beside = statistics.median(wait() for _ in range(3))
        over.set()
        for each in running:
            each.result()
    return {"alone": alone, "beside three": beside}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
