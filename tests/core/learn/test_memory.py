"""Passes fit into the free memory; layers are recomputed only if one row does not fit."""

from __future__ import annotations

import pytest
import torch

from agentpref.learn import logps, memory
from agentpref.learn.team import Team
from tests.core.learn.families import CONDITIONAL, ROWS, adapted_model, held_in

LONGEST = 13


@pytest.fixture
def model():
    return adapted_model("llama")


@pytest.mark.parametrize("family", ["llama", "mixtral", *CONDITIONAL])
def test_the_layers_are_those_of_the_language_model(family):
    """A tower has three layers here, and a layer has four experts."""
    model = adapted_model(family)
    layers = memory.decoder_layers(model)
    assert len(layers) == 2
    assert all(
        hasattr(layer, "self_attn") and hasattr(layer, "input_layernorm") for layer in layers
    )


def states(model):
    route = logps.choose_route(model, ROWS, pad=0, longest=40).route
    return lambda: route.states(model, route.layout(ROWS[:1], 0))


def room(model, free):
    return memory.room(model, states(model), ROWS[0].width, longest=LONGEST, free=free)


def test_a_pass_is_as_large_as_is_useful_if_memory_allows(model):
    assert room(model, 1 << 40) == memory.Room(memory.tokens_per_pass(model), recomputes=False)


def test_a_pass_is_smaller_if_there_is_less_memory(model):
    needed = memory.kept_bytes(states(model)) / ROWS[0].width
    assert room(model, int(2 * 50.5 * needed)) == memory.Room(50, recomputes=False)


def test_layers_are_recomputed_if_a_row_does_not_fit(model):
    needed = memory.kept_bytes(states(model)) / ROWS[0].width
    found = room(model, int(2 * (LONGEST - 1) * needed))
    assert found.recomputes
    assert found.tokens > LONGEST
    assert memory.kept_bytes(states(model)) / ROWS[0].width < needed / 2


def test_a_pass_takes_one_row_if_even_that_does_not_fit(model):
    assert room(model, 1) == memory.Room(1, recomputes=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(dtype):
    model = held_in("llama", dtype)
    leaves = [p for name, p in model.named_parameters() if "lora_" in name]
    before = torch.autograd.grad(states(model)().square().sum(), leaves)
    memory.recompute_layers(model)
    memory.recompute_layers(model)  # the second call changes nothing
    after = torch.autograd.grad(states(model)().square().sum(), leaves)
    assert all(map(torch.equal, before, after))


def test_without_gradients_nothing_is_recomputed(model, monkeypatch):
    memory.recompute_layers(model)
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", None)
    with torch.no_grad():
        states(model)()


def test_free_bytes_of_a_cpu_are_those_of_the_machine():
    assert memory.free_bytes("cpu") > 1 << 20


class Beside(Team):
    """A process whose team mate has these numbers."""

    def __init__(self, other):
        super().__init__(0, 2)
        self._other = other

    def least(self, numbers):
        return list(map(min, numbers, self._other))


def test_a_team_agrees_on_the_smallest_pass_and_recomputes_together(model):
    ample = memory.Room(100, recomputes=False)
    assert memory.agreed(model, ample, Team()) == ample
    assert memory.agreed(model, ample, Beside([50.0, 1.0])) == memory.Room(50, recomputes=False)
    kept = memory.kept_bytes(states(model))
    assert memory.agreed(model, ample, Beside([200.0, 0.0])) == memory.Room(100, recomputes=True)
    assert memory.kept_bytes(states(model)) < kept / 2, "it recomputes like the others"


def test_the_processes_of_a_team_share_the_memory_of_a_cpu(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", {"cpu": 100, "cuda": 10}.__getitem__)
    assert memory.share_of_free_bytes("cpu", Team()) == 100
    assert memory.share_of_free_bytes("cpu", Team(1, 2)) == 50
    assert memory.share_of_free_bytes("cuda", Team(1, 2)) == 10


def test_on_a_cpu_a_pass_takes_as_many_bytes_in_float32_as_in_bfloat16(model):
    wide = memory.tokens_per_pass(model)
    assert memory.tokens_per_pass(model.bfloat16()) == 2 * wide
