"""Layouts name each completion token once, at the place that predicts it."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn.batch import chunks, plain, shared
from agentpref.learn.encode import EncodedPair
from agentpref.types import Pair, Prompt

PAIR = Pair("p", "n", 0.0, Prompt("q", ()), {}, {}, "comparison")
ROWS = [
    EncodedPair(PAIR, (5, 6, 7, 8), (9, 10), (11, 12, 13)),
    EncodedPair(PAIR, (5,), (14,), (15, 0, 16, 17)),
    EncodedPair(PAIR, (18, 19, 20, 21, 22, 23), (24, 25, 26), (24, 27)),
]


def completions(rows):
    return [row.chosen for row in rows] + [row.rejected for row in rows]


@pytest.mark.parametrize("layout", [plain, shared])
def test_targets_are_the_completions_first_ones_first(layout):
    batch = layout(ROWS, 0)
    found = [
        tuple(batch.targets[batch.owner == owner].tolist()) for owner in range(batch.completions)
    ]
    assert found == completions(ROWS)


@pytest.mark.parametrize("layout", [plain, shared])
def test_a_token_is_predicted_where_the_one_before_it_stands(layout):
    batch = layout(ROWS, 0)
    seen = batch.ids.flatten()[batch.where]
    prompts = [row.prompt for row in ROWS] * 2
    expected = [
        before
        for prompt, ids in zip(prompts, completions(ROWS), strict=True)
        for before in (prompt[-1], *ids[:-1])
    ]
    assert seen.tolist() == expected


@pytest.mark.parametrize("layout", [plain, shared])
def test_positions_count_from_the_start_of_the_prompt(layout):
    batch = layout(ROWS, 0)
    found = batch.positions.flatten()[batch.where]
    expected = [
        len(row.prompt) - 1 + at
        for half in (0, 1)
        for row in ROWS
        for at in range(len(row.completions[half]))
    ]
    assert found.tolist() == expected


def test_sums_and_means_are_by_completion():
    batch = shared(ROWS, 0)
    ones = torch.ones(len(batch.targets))
    assert batch.sums(ones).tolist() == [len(ids) for ids in completions(ROWS)]
    assert batch.means(2 * ones).tolist() == [2.0] * 6


def test_shared_rows_hold_the_prompt_once():
    assert (shared(ROWS, 0).ids == 18).sum() == 1
    assert (plain(ROWS, 0).ids == 18).sum() == 2


def test_parts_of_shared_rows_are_as_wide_as_the_kernel_likes():
    batch = shared(ROWS, 0)
    prompt = batch.mask.shape[-1]
    assert (prompt, batch.ids.shape[1] - prompt) == (16, 2 * 16)
    assert batch.mask.sum(-1).flatten().tolist() == [len(row.prompt) - 1 for row in ROWS]


def test_chunks_keep_order_and_budget():
    runs = list(chunks(ROWS * 4, lambda row: row.width, 24))
    assert [row for run in runs for row in run] == ROWS * 4
    assert all(len(run) == 1 or len(run) * max(r.width for r in run) <= 24 for run in runs)


@pytest.mark.parametrize("size", [2, 3])
def test_chunks_that_are_dealt_out_keep_the_budget_of_each(size):
    runs = list(chunks(ROWS * 4, lambda row: row.width, 24, side_by_side=size))
    assert [row for run in runs for row in run] == ROWS * 4
    for run in runs:
        widest, share = max(r.width for r in run), len(run[::size])
        assert share == 1 or share * widest <= 24
    assert len(runs) < len(list(chunks(ROWS * 4, lambda row: row.width, 24)))
