"""What rows of every format have in common: redaction."""

from __future__ import annotations

from agentpref.prefer.rows import PreferenceRow, UnpairedRow, redacted_row
from agentpref.record.messages import prompt_of


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def hidden(text: str) -> str:
    return text.replace("ana@example.org", "[email]")


def test_every_text_of_a_row_is_redacted_and_the_prompt_addressed_anew() -> None:
    def row(name: str) -> PreferenceRow:
        tool = {"type": "function", "function": {"name": "ask", "description": f"asks {name}"}}
        asked = prompt_of([said("user", f"I am {name}.")], [tool])
        return PreferenceRow(
            asked, said("assistant", f"Hi {name}!"), said("assistant", name), tag=name
        )

    told, kept = row("ana@example.org"), row("[email]")
    clean = redacted_row(told, hidden)
    assert isinstance(clean, PreferenceRow)
    assert (clean.prompt, clean.chosen, clean.rejected) == (kept.prompt, kept.chosen, kept.rejected)


def test_a_judged_answer_is_redacted_too() -> None:
    asked = prompt_of([said("user", "Who?")])
    row = UnpairedRow(asked, said("assistant", "ana@example.org"), desirable=False, tag="x")
    assert redacted_row(row, hidden) == UnpairedRow(
        asked, said("assistant", "[email]"), desirable=False, tag="x"
    )
