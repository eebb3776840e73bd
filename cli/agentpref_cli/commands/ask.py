"""`ask`: puts the comparisons that tell most to a person, in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agentpref_cli import options
from agentpref_cli.terminal import BOLD, GOOD, WARN, print_result, say

if TYPE_CHECKING:
    from agentpref.elicitation import Question, Queue

_KEYS = "1 or 2 is better, t tie, b both bad, s skip, u undo, q quit; a comment may follow"

RuleOption = Annotated[
    Literal["random", "entropy", "disagreement", "d_optimal", "evidence"] | None,
    typer.Option(
        help="What chooses [default: entropy, or random where people disagree often]; evidence: "
        "what the gate lacks.",
        show_default=False,
    ),
]
Gold = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Whose answers are right: one question in ten is one that ID has answered.",
        show_default=False,
    ),
]
Pool = Annotated[
    int, typer.Option(min=1, metavar="N", help="Choose from so many pairs, the newest.")
]
RewardBase = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where the reward model's base is [default: as it was fitted with].",
        show_default=False,
    ),
]


def ask(
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="So many questions.")] = 20,
    user_id: Annotated[
        str | None,
        typer.Option(
            "--user-id",
            metavar="ID",
            help="Who answers [default: nobody named].",
            show_default=False,
        ),
    ] = None,
    rule: RuleOption = None,
    pool: Pool = 200,
    gold: Gold = None,
    model: RewardBase = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what is drawn at random.")] = 0,
    home: options.Home = None,
    namespace: options.Namespace = "default",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the questions as one JSON object, and ask none.")
    ] = False,
) -> None:
    """Ask which of two answers is better, first what tells the reward model most.

    Which revision wrote which answer is not shown, and which comes first is chance. Each answer is
    logged at once, as a comparison. Nobody is asked the same twice, over sessions too; one question
    in ten is one that somebody else has answered, because that tells how far people agree. Answers
    may be piped: a line each.
    """
    from agentpref.elicitation import open_queue
    from agentpref.elicitation.acquisition import WITHOUT_REWARD
    from agentpref.elicitation.questions import newest_reward

    reward = None if rule in WITHOUT_REWARD else newest_reward(home, namespace, model=model)
    with open_queue(
        home, namespace=namespace, person=user_id, rule=rule, reward=reward, pool=pool, seed=seed,
        gold=gold,
    ) as queue:  # fmt: skip
        questions = queue.next(n)
        if as_json:
            about: dict[str, Any] = {
                "rule": queue.rule, "noise": queue.noise, "notes": queue.notes,
                "questions": [_plain(one) for one in questions],
            }  # fmt: skip
            print_result(True, about, lambda: None)
            return
        for note in queue.notes:
            say(note, WARN)
        if not questions:
            say(
                "there is nothing to ask: no prompt has two answers that nobody compared; "
                "`agentpref judge run --sample` and `agentpref online` draw second answers",
                WARN,
            )
            return
        try:
            _put(queue, questions)
        except KeyboardInterrupt:
            say("")
        _sum_up(queue, gold)


def _put(queue: Queue, questions: list[Question]) -> None:
    place = 0
    while place < len(questions):
        _show(questions[place], place + 1, len(questions))
        line = sys.stdin.readline()
        if not line:
            return
        key, _, comment = line.strip().partition(" ")
        question, said = questions[place], comment.strip() or None
        if key in ("1", "2", "t"):
            queue.answer(question, {"1": "a", "2": "b", "t": "tie"}[key], said)  # type: ignore[arg-type]
        elif key == "b":
            queue.both_bad(question, said)
        elif key == "s":
            queue.skip(question)
        elif key == "u" and place:
            place -= 1
            queue.undo(questions[place])
            continue
        elif key == "q":
            return
        else:
            say(_KEYS, WARN)
            continue
        place += 1


def _show(question: Question, number: int, count: int) -> None:
    from agentpref.prefer.judges.asking import said

    say(f"\n{number} of {count} · {question.first.tag}", BOLD)
    for message in question.prompt:
        say(f"{message.get('role')}: {said(message)}")
    for place, run in enumerate((question.first, question.second), start=1):
        say(f"\n[{place}]", BOLD)
        say(said(run.output) or "(empty)")
    say(f"\n{_KEYS}")
    sys.stdout.flush()


def _sum_up(queue: Queue, gold: str | None) -> None:
    say(f"{queue.answered} answered, {queue.skipped} skipped", GOOD if queue.answered else WARN)
    if queue.agreed:
        whom = "somebody else has" if gold is None else f"{gold} has"
        say(f"{sum(queue.agreed)} of {len(queue.agreed)} as {whom} said")


def _plain(one: Question) -> dict[str, Any]:
    return {
        "question": one.id,
        "messages": [*one.prompt],
        "first": {"run": one.first.run_id, "message": one.first.output},
        "second": {"run": one.second.run_id, "message": one.second.output},
        "tag": one.first.tag,
        "why": one.why,
        "repeated": one.repeated,
    }
