"""Fakes for what judges: a judge that is a rule, and a server that judges, with known faults.

Both are deterministic: what goes wrong with a question is drawn from the question and the seed, in
whatever order questions come.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from agentpref.prefer.judges.asking import said
from agentpref.prefer.judges.injection import knows_control
from agentpref.prefer.judges.verdicts import Verdict
from agentpref.types import Message, Source, Winner

Prefers = Callable[[str, str, str], Winner]
"""Says which of two answers to a question is better: ``prefers(question, a, b)``."""


def shorter(question: str, a: str, b: str) -> Winner:
    """The shorter answer is better."""
    return "tie" if len(a) == len(b) else "a" if len(a) < len(b) else "b"


@dataclass(frozen=True)
class FakeJudge:
    """A judge that is a rule, and is wrong about a share of the questions in both orders.

    Args:
        prefers: the rule.
        noise: the share of questions about which it says the opposite.
        position: the share of questions at which it names what it is shown first.
        source: ``"code"`` needs no calibration.
        name: under which a home knows it.
    """

    prefers: Prefers = shorter
    _: KW_ONLY
    noise: float = 0.0
    position: float = 0.0
    seed: int = 0
    source: Source = "model"
    name: str = "fakejudge"
    asked: list[tuple[str, str, str]] = field(default_factory=list, compare=False)

    def judge(
        self,
        prompts: Sequence[Sequence[Message]],
        completions: Sequence[tuple[Message, Message]],
    ) -> list[Verdict]:
        """Say of each pair of completions which is better."""
        found = []
        for prompt, (a, b) in zip(prompts, completions, strict=True):
            question, texts = said(prompt[-1]), (said(a), said(b))
            self.asked.append((question, *texts))
            winner = self.prefers(question, *texts)
            if drawn(self.seed, "noise", question, *sorted(texts)) < self.noise:
                winner = {"a": "b", "b": "a", "tie": "tie"}[winner]  # type: ignore[assignment]
            if drawn(self.seed, "position", question, *sorted(texts)) < self.position:
                winner = "a"
            found.append(Verdict(winner, principle="the rule", rationale="by the rule"))
        return found


def drawn(seed: int, *about: str) -> float:
    """A number from 0 to 1 that is as good as random, and the same each time."""
    digest = hashlib.blake2b(json.dumps([seed, *about]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass
class JudgeServer:
    """A server that speaks OpenAI's API and judges by a rule; use it in a ``with`` block.

    >>> with JudgeServer(shorter, malformed=0.05) as server:   # doctest: +SKIP
    ...     rubric = f"---\\nmodel: fake\\nbase_url: {server.url}\\nprinciples: [short]\\n---\\n"

    Args:
        prefers: the rule.
        noise: the share of questions about which it says the opposite, in both orders.
        position: the share at which it names answer A.
        longer: the share at which it names the longer answer.
        stalls: the share of calls that it does not answer for ``stall`` seconds.
        malformed: the share of calls that it answers with something that is no verdict.
        busy: the share of calls that it refuses with 429 and ``Retry-After``.
        broken: the share of calls whose answer is no JSON.
        refuses: the share of calls that it refuses with 400.
        chatter: whether it talks around its verdicts.
        logprobs: whether it gives log-probabilities: .9 for what it says.
        delay: how long a call takes, in seconds.
        obeys: whether it does what an answer tells it, such as "choose me" or "choose answer A".

    ``calls`` counts the calls by what came of them.
    """

    prefers: Prefers = shorter
    _: KW_ONLY
    noise: float = 0.0
    position: float = 0.0
    longer: float = 0.0
    stalls: float = 0.0
    malformed: float = 0.0
    busy: float = 0.0
    broken: float = 0.0
    refuses: float = 0.0
    chatter: bool = False
    logprobs: bool = False
    delay: float = 0.0
    stall: float = 5.0
    obeys: bool = False
    seed: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    _tries: Counter[str] = field(default_factory=Counter, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _server: ThreadingHTTPServer | None = field(default=None, init=False)

    def __enter__(self) -> JudgeServer:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge._handle(self)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @property
    def url(self) -> str:
        """What a client takes as ``base_url``."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def _handle(self, call: BaseHTTPRequestHandler) -> None:
        body = json.loads(call.rfile.read(int(call.headers["Content-Length"])))
        asked = json.dumps(body["messages"])
        with self._lock:
            self._tries[asked] += 1
            attempt = str(self._tries[asked])
        time.sleep(self.delay)
        for fault in ("stalls", "busy", "broken", "refuses"):
            if drawn(self.seed, fault, asked, attempt) < getattr(self, fault):
                self._count(fault)
                return self._fail(call, fault)
        if drawn(self.seed, "malformed", asked, attempt) < self.malformed:
            self._count("malformed")
            return _send(call, 200, json.dumps(self._answer("I cannot decide this today.", "")))
        self._count("judged")
        return _send(call, 200, json.dumps(self._answer(*self._words(body["messages"]))))

    def _count(self, what: str) -> None:
        with self._lock:
            self.calls[what] += 1

    def _fail(self, call: BaseHTTPRequestHandler, fault: str) -> None:
        if fault == "stalls":
            time.sleep(self.stall)
            return _send(call, 504, '{"error": {"message": "gateway time-out"}}')
        if fault == "busy":
            message = '{"error": {"message": "slow down"}}'
            return _send(call, 429, message, {"Retry-After": "0.05"})
        if fault == "refuses":
            return _send(call, 400, '{"error": {"message": "maximum context length"}}')
        return _send(call, 500, '{"choices": [{"message": {"content": "Ver')

    def _words(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What it says, and its verdict."""
        shown = next(m["content"] for m in reversed(messages) if "<answer-A " in m["content"])
        question, a, b = (_between(shown, tag) for tag in ("request", "answer-A", "answer-B"))
        winner = self._winner(question.partition(": ")[2], a, b)
        verdict = {"a": "A", "b": "B", "tie": "tie"}[winner]
        text = f"Principle: the rule\nReason: by the rule\nVerdict: {verdict}"
        if self.chatter:
            text = f"Sure! Let me think.\n```\n{text.replace('Verdict', '**VERDICT**')}\n```\nDone."
        return text, verdict

    def _winner(self, question: str, a: str, b: str) -> Winner:
        if self.obeys:
            for text, place in ((a, "a"), (b, "b")):
                told = re.search(r"(?:choose|pick|verdict:?) (me|(?:answer )?([ab]))\b", text, re.I)
                if told is not None:
                    side = (told[2] or place).lower()
                    return "a" if side == "a" else "b"
        if knows_control(question, a):  # a plain question, which it knows
            return "a"
        about = (question, *sorted((a, b)))
        if drawn(self.seed, "position", *about) < self.position:
            return "a"
        if len(a) != len(b) and drawn(self.seed, "longer", *about) < self.longer:
            return "a" if len(a) > len(b) else "b"
        winner = self.prefers(question, a, b)
        if drawn(self.seed, "noise", *about) < self.noise:
            return {"a": "b", "b": "a", "tie": "tie"}[winner]  # type: ignore[return-value]
        return winner

    def _answer(self, text: str, verdict: str) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        if self.logprobs and verdict:
            before, _, after = text.rpartition(verdict)
            other = "B" if verdict == "A" else "A"
            top = [{"token": verdict, "logprob": -0.10536, "bytes": None},
                   {"token": other, "logprob": -2.302585, "bytes": None}]  # fmt: skip
            tokens = [(before, []), (verdict, top), (after, [])]
            choice["logprobs"] = {
                "content": [
                    {"token": token, "logprob": -0.1, "bytes": None, "top_logprobs": tops}
                    for token, tops in tokens
                    if token
                ]
            }
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "fake",
            "choices": [choice],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }


def _between(text: str, tag: str) -> str:
    found = re.search(rf"<{tag} (\w+)>\n(.*?)\n</{tag} \1>", text, re.DOTALL)
    return found[2] if found is not None else ""


def _send(
    call: BaseHTTPRequestHandler, status: int, body: str, headers: dict[str, str] | None = None
) -> None:
    content = body.encode()
    try:
        call.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            call.send_header(name, value)
        call.send_header("Content-Length", str(len(content)))
        call.end_headers()
        call.wfile.write(content)
    except (BrokenPipeError, ConnectionResetError):  # the client has given up
        pass
