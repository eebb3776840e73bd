"""How a candidate fares in tags that never train, from its scores alone."""

from __future__ import annotations

from agentpref.prove.exam import by_tag
from tests.core.test_retry import scores

RIGHT, WRONG, SAME = (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)


def test_each_tag_has_its_accuracies_and_the_prompts_that_changed():
    hard, easy = by_tag(scores(hard=[RIGHT] * 3 + [WRONG], easy=[SAME] * 2))[::-1]
    assert (easy.tag, easy.prompts, easy.better, easy.worse) == ("easy", 2, 0, 0)
    assert (hard.tag, hard.prompts, hard.before, hard.after) == ("hard", 4, 0.25, 0.75)
    assert (hard.better, hard.worse) == (3, 1)
    assert hard.note == (
        "held-out tag 'hard': .25 -> .75 on 4 prompts that no update trains, 3 better, 1 worse"
    )


def test_a_loss_that_is_not_by_chance_is_called_one():
    (sure,), (unsure,) = by_tag(scores(a=[WRONG] * 5)), by_tag(scores(a=[WRONG] * 4))
    assert sure.note.endswith("0 better, 5 worse; a loss (p 0.031)")
    assert unsure.note.endswith("0 better, 4 worse")
    assert by_tag(scores()) == []
