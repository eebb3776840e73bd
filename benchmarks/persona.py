"""The persona statements as questions: one reader for all benchmarks that ask them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "data" / "persona"
QUESTION = 'Is the following statement something you would say?\n"{}"'


class Question(NamedTuple):
    """A statement as it is asked about, the answer that matches the trait, and the other one."""

    text: str
    liked: str
    disliked: str


def questions(trait: str) -> list[Question]:
    """The statements of a trait, each once, in the order of the file."""
    lines = (FOLDER / f"{trait}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {row["statement"]: row["answer"] for row in map(json.loads, lines)}
    other = {"Yes": "No", "No": "Yes"}
    return [
        Question(QUESTION.format(statement), answer, other[answer])
        for statement, answer in answers.items()
    ]
