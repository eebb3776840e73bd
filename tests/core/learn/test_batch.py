"""Layouts name each token that counts once, at the place that predicts it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.learn.batch import chunks, plain, shared
from tests.core.learn.families import ROWS, row, rows_of

IDS = st.lists(st.integers(1, 99), min_size=1, max_size=20).map(tuple)
LAYOUTS = pytest.mark.parametrize("layout", [plain, shared])


@st.composite
def many_rows(draw):
    """Up to four rows with the same number of completions, some with masks."""
    n = draw(st.integers(1, 5))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        completions = draw(st.lists(IDS, min_size=n, max_size=n))
        masks = [
            draw(st.none() | st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
            for ids in completions
        ]
        masks = tuple(tuple(mask) if mask and any(mask) else None for mask in masks)
        rows.append(row(draw(IDS), *completions, masks=masks))
    return rows


def counting(own):
    """Of each completion, the numbers of the tokens that count."""
    masks = zip(own.completions, own.masks, strict=True)
    return [[at for at in range(len(ids)) if mask is None or mask[at]] for ids, mask in masks]


def predicted(rows):
    """Row, completion and number of each token that counts, in the order of a batch."""
    return [
        (own, own.completions[number], at)
        for number in range(len(rows[0].completions))
        for own in rows
        for at in counting(own)[number]
    ]


@LAYOUTS
@given(rows=many_rows())
def test_each_token_that_counts_is_predicted_from_the_token_before_it(layout, rows):
    batch = layout(rows, 0)
    expected = [
        (ids[at], ids[at - 1] if at else own.prompt[-1], len(own.prompt) - 1 + at)
        for own, ids, at in predicted(rows)
    ]
    before, positions = (x.flatten()[batch.where] for x in (batch.ids, batch.positions))
    found = (x.tolist() for x in (batch.targets, before, positions))
    assert list(zip(*found, strict=True)) == expected


@LAYOUTS
@given(rows=many_rows())
def test_sums_means_and_lengths_are_by_row_and_completion(layout, rows):
    batch = layout(rows, 0)
    values = torch.linspace(1, 2, len(batch.targets))
    lists = [[[] for _ in own.completions] for own in rows]
    at = iter(values.double().tolist())
    for number in range(batch.n):
        for index, own in enumerate(rows):
            lists[index][number] = [next(at) for _ in counting(own)[number]]
    assert (batch.rows, batch.n) == (len(rows), len(rows[0].completions))
    assert batch.lengths().tolist() == [[len(part) for part in parts] for parts in lists]
    sums = torch.tensor([[sum(part) for part in parts] for parts in lists], dtype=torch.float64)
    torch.testing.assert_close(batch.sums(values), sums)
    torch.testing.assert_close(batch.spread(values), sums / batch.lengths().clamp(min=16))


@LAYOUTS
def test_an_answer_of_few_tokens_counts_as_sixteen(layout):
    one, long = row((5, 6), (9, 10)), row((5, 6), tuple(range(1, 41)))
    assert layout([one], 0).spread(torch.ones(2)).item() == pytest.approx(2 / 16)
    assert layout([long], 0).spread(torch.ones(40)).item() == pytest.approx(1.0)


def test_sums_of_one_completion_lie_side_by_side_in_memory():
    batch = shared(ROWS, 0)
    assert batch.sums(torch.ones(len(batch.targets)))[:, 1].is_contiguous()


@LAYOUTS
def test_rows_with_different_numbers_of_completions_are_refused(layout):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        layout([*rows_of(2), *rows_of(3)], 0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shared_rows_hold_the_prompt_once(n):
    assert (shared(rows_of(n), 0).ids == 18).sum() == 1
    assert (plain(rows_of(n), 0).ids == 18).sum() == n


@pytest.mark.parametrize("n", [1, 2, 5])
def test_short_parts_of_shared_rows_are_as_wide_as_the_longest(n):
    batch = shared(rows_of(n), 0)
    longest = max(len(ids) for own in rows_of(n) for ids in own.completions)
    assert batch.mask.shape == (3, n, 1, 5)
    assert batch.ids.shape == (3, 5 + n * longest)
    assert (batch.mask.sum(-1)[..., 0] == torch.tensor([[3], [0], [5]])).all()


def test_a_row_without_a_prompt_before_its_last_token_has_a_column_of_padding():
    batch = shared([row((5,), (6,), (7, 8))], 0)
    assert batch.ids.tolist() == [[0, 5, 0, 5, 7]]
    assert not batch.mask.any()


@pytest.mark.parametrize(("tokens", "width"), [(255, 256), (249, 256), (248, 248), (17, 17)])
def test_long_parts_are_padded_to_a_width_the_kernel_is_fast_on_where_that_adds_little(
    tokens, width
):
    ids = tuple(range(1, tokens + 1))
    batch = shared([row((*ids, 1), ids, ids[:3])], 0)
    assert batch.mask.shape[-1] == width
    assert batch.ids.shape == (1, 3 * width)


def cut(rows, budget, **options):
    width, n = (lambda own: own.width), (lambda own: len(own.completions))
    return list(chunks(rows, width, budget, n=n, **options))


def test_chunks_keep_order_and_budget():
    runs = cut(ROWS * 4, 24)
    assert [own for run in runs for own in run] == ROWS * 4
    assert all(len(run) == 1 or len(run) * max(r.width for r in run) <= 24 for run in runs)


@given(st.lists(st.integers(1, 5)))
def test_chunks_never_mix_rows_with_different_numbers_of_completions(numbers):
    rows = [rows_of(n)[0] for n in numbers]
    runs = cut(rows, 60)
    assert all(len({len(own.completions) for own in run}) == 1 for run in runs)
    assert sorted(own for run in runs for own in run) == sorted(rows)


@pytest.mark.parametrize("size", [2, 3])
def test_chunks_for_several_processes_keep_the_budget_of_each(size):
    runs = cut(ROWS * 4, 24, side_by_side=size)
    assert [own for run in runs for own in run] == ROWS * 4
    for run in runs:
        widest, share = max(r.width for r in run), len(run[::size])
        assert share == 1 or share * widest <= 24
    assert len(runs) < len(cut(ROWS * 4, 24))
