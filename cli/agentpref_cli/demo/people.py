"""The people of the demo: what they think of an answer, put into the log's own words.

The labels are the data's. They arrive in the three ways in which people give them: a comparison of
two drafts, thumbs on two drafts, and a correction of the answer. Everything here goes through the
public ``Log``.
"""

from __future__ import annotations

from agentpref.record.log import Log
from agentpref_cli.demo.app import Answer
from agentpref_cli.demo.nights import Question


def react(log: Log, tag: str, question: Question, answer: Answer, number: int) -> None:
    """Give feedback on one answer, in one of three ways by turns.

    A liked answer is put beside the draft that the data dislikes, any other answer beside the
    draft that the data likes; a correction needs no second draft.
    """
    good = answer.text == question.liked
    if number % 3 == 0 and not good:
        log.correct(answer.run_id, question.liked, user_id=tag)
        return
    draft = log.record(
        [{"role": "user", "content": question.text}],
        question.disliked if good else question.liked,
        model="second draft",
        tags=[tag],
        user_id=tag,
    )
    if number % 3 == 1:
        log.compare(answer.run_id, draft, winner="a" if good else "b", user_id=tag)
        return
    log.feedback(answer.run_id, key="thumbs", score=good, user_id=tag)
    log.feedback(draft, key="thumbs", score=not good, user_id=tag)
