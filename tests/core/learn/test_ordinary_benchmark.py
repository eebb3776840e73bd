"""The benchmark of ordinary answers: what counts as one in good form."""

from __future__ import annotations

import random

import pytest

from benchmarks.ordinary import in_good_form, requests
from benchmarks.tiny_model import dialogues


@pytest.mark.parametrize("style", dialogues.STYLES)
def test_every_style_is_in_good_form_with_any_names_in_it(style):
    for kind in dialogues.KINDS:
        one, other = kind(random.Random(1)), kind(random.Random(2))
        assert in_good_form(one, dialogues.answer(one, style))
        assert in_good_form(one, dialogues.answer(other, style)), (
            "the form counts, whatever it names"
        )


def test_damage_and_answers_to_other_requests_are_not():
    request = dialogues.table(random.Random(0))
    answers = [dialogues.answer(kind(random.Random(0)), "verbose") for kind in dialogues.KINDS]
    assert sum(in_good_form(request, answer) for answer in answers) == 1
    for broken in ("", "No", "I have booked a table forNo", answers[2] + answers[2]):
        assert not in_good_form(request, broken)


def test_requests_are_different_and_fixed_by_the_seed():
    found = requests(50, 3)
    assert len({request.text for request in found}) == 50
    assert requests(50, 3) == found != requests(50, 4)
