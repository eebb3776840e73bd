"""No message quotes what an app gave to be recorded: messages go to logs, texts are redacted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentpref import Chat, Log
from agentpref.errors import AgentprefError
from agentpref.home import Home
from agentpref.prefer.exchange import import_file
from agentpref.record.ingest.redaction import redact
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.chat import _request

MARK = "ana@example.org"
ASK = [{"role": "user", "content": "Hello!"}]


class Hostile:
    """An object that says the text whatever it is asked."""

    def __repr__(self) -> str:
        return f"<{MARK}>"

    def __float__(self) -> float:
        raise ValueError(f"could not convert {MARK}")


def said(error: BaseException | None) -> Iterator[str]:
    """All that a log would print of an error and of those it is chained to."""
    while error is not None:
        yield f"{error} {error!r} {error.args}"
        yield from said(error.__context__ if error.__cause__ is None else error.__cause__)
        error = error.__context__


def breaking(text: str) -> str:
    raise ValueError(f"cannot redact {text}")


RUNS: dict[str, dict[str, Any]] = {
    "tags": {"tags": MARK},
    "tags in a list": {"tags": [{MARK: MARK}]},
    "params": {"params": MARK},
    "metadata": {"metadata": MARK},
    "token_ids": {"token_ids": MARK},
    "logprobs": {"logprobs": [MARK]},
    "run_id": {"run_id": f"{MARK}\x07"},
    "role": {"messages": [{"role": MARK, "content": MARK}]},
    "content": {"messages": [{"role": "user", "content": {MARK: MARK}}]},
    "messages": {"messages": MARK},
    "output": {"output": {"role": MARK, "content": MARK}},
    "user as output": {"output": {"role": "user", "content": MARK}},
    "tools": {"tools": MARK},
    "a tool": {"tools": [MARK]},
    "objects": {"messages": [{"role": "user", "content": [Hostile()]}]},
    "half a character": {"output": f"{MARK} \ud800"},
}


@pytest.mark.guarantee("privacy")
@pytest.mark.parametrize("given", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_run_that_is_refused_is_not_quoted(
    tmp_path: Path, given: dict[str, Any], strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with Log(tmp_path, strict=strict, redact=redact) as log:
        errors = []
        try:
            log.record(**{"messages": ASK, "output": "Hi!"} | given)
        except AgentprefError as error:
            errors += said(error)
        log.flush(10)
        assert MARK not in "".join((*errors, *log.dropped, *log.altered, caplog.text))


@pytest.mark.parametrize("strict", [False, True])
def test_a_redactor_that_breaks_is_not_quoted(
    tmp_path: Path, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with Log(tmp_path, strict=strict, redact=breaking) as log:
        errors = []
        try:
            log.record(ASK, MARK)
        except AgentprefError as error:
            errors += said(error)
        log.flush(10)
        assert errors or log.dropped == {"RedactionFailed": 1}
        assert MARK not in "".join((*errors, caplog.text))
        assert "test_quotes.py" in "".join((*errors, caplog.text)), "where it broke"


JUDGEMENTS: dict[str, Callable[[Log, str], object]] = {
    "up": lambda log, run: log.thumbs(run, up=MARK),  # type: ignore[arg-type]
    "comment": lambda log, run: log.thumbs(run, up=True, comment=[MARK]),  # type: ignore[arg-type]
    "source": lambda log, run: log.thumbs(run, up=True, source=MARK),  # type: ignore[arg-type]
    "unknown run": lambda log, run: log.thumbs(MARK, up=True),
    "prose as a run": lambda log, run: log.thumbs(f"write to {MARK}", up=True),
    "score": lambda log, run: log.feedback(run, key="k", score=MARK),  # type: ignore[arg-type]
    "hostile score": lambda log, run: log.feedback(run, key="k", score=Hostile()),  # type: ignore[arg-type]
    "array": lambda log, run: log.feedback(run, key="k", score=np.array(MARK)),  # type: ignore[arg-type]
    "declared key": lambda log, run: log.declare(f"{MARK}\n"),
    "declared scale": lambda log, run: log.declare("k", low=MARK),  # type: ignore[arg-type]
    "trace": lambda log, run: log.thumbs(trace_id=MARK, up=True),
    "prose as a trace": lambda log, run: log.thumbs(trace_id=f"write to {MARK}", up=True),
    "value": lambda log, run: log.feedback(run, key="k", value={1, MARK}),
    "key": lambda log, run: log.feedback(run, key=f"{MARK}\n", score=1),
    "nothing": lambda log, run: log.feedback(run, key=MARK),
    "winner": lambda log, run: log.compare(run, "x", winner=MARK),  # type: ignore[arg-type]
    "itself": lambda log, run: log.compare(MARK, MARK, winner="a"),
    "retracted key": lambda log, run: log.retract(run, key=[MARK]),  # type: ignore[arg-type]
    "against": lambda log, run: log.retract(run, against=MARK),
    "correction": lambda log, run: log.correct(run, {"role": MARK, "content": MARK}),
    "no message": lambda log, run: log.correct(run, [MARK]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("judge", JUDGEMENTS.values(), ids=JUDGEMENTS)
def test_a_judgement_that_is_refused_is_not_quoted(
    tmp_path: Path, judge: Callable[[Log, str], object], caplog: pytest.LogCaptureFixture
) -> None:
    with Log(tmp_path, redact=redact) as log:
        run = log.record(ASK, "Hi!")
        with pytest.raises(AgentprefError) as caught:
            judge(log, run)
    assert MARK not in "".join((*said(caught.value), caplog.text))


ROWS = (
    f'{{"prompt": {{"x": "{MARK}"}}, "chosen": "a", "rejected": "b"}}',
    f'{{"prompt": "a", "completion": "b", "label": "{MARK}"}}',
    f'{{"prompt": [{{"role": "{MARK}", "content": ""}}], "chosen": "a", "rejected": "b"}}',
    f'{{"conversations": "{MARK}", "chosen": "a", "rejected": "b"}}',
    f'{{"conversations": [{{"from": "{MARK}", "value": "x"}}], "chosen": {{"from": "gpt", '
    '"value": "a"}, "rejected": {"from": "gpt", "value": "b"}}',
    f'"{MARK}"',
    f'{{"prompt": "{MARK}',
    f'[{{"prompt": "{MARK}", "chosen": nope}}]',
    f'["{MARK}"]',
)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_is_refused_is_not_quoted(tmp_path: Path, row: str) -> None:
    (tmp_path / "rows.json").write_text(row)
    with pytest.raises(AgentprefError) as caught:
        import_file(Home.create(tmp_path / "home"), tmp_path / "rows.json", redact=redact)
    assert MARK not in "".join(said(caught.value))


@pytest.mark.parametrize(
    "given",
    [{"stop": MARK}, {"seed": MARK}, {"temperature": MARK}, {"max_tokens": MARK}, {"top_p": MARK},
     {"chat_template_kwargs": MARK}, {"tools": MARK}, {"messages": MARK}, {"stop": [MARK, 1]}],
    ids=str,
)  # fmt: skip
def test_a_request_that_is_refused_is_not_quoted(given: dict[str, Any]) -> None:
    with pytest.raises(AgentprefError) as caught:
        GenerationRequest(**{"messages": tuple(ASK)} | given)
    assert MARK not in "".join(said(caught.value))


@pytest.mark.parametrize("arguments", [(MARK, (), (), {}), (ASK, (), MARK, {})])
def test_what_a_chat_refuses_is_not_quoted(arguments: tuple[Any, ...]) -> None:
    assert Chat.reply is not None
    with pytest.raises(AgentprefError) as caught:
        _request(*arguments)
    assert MARK not in "".join(said(caught.value))
