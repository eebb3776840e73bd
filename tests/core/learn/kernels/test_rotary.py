"""Turning heads by their positions: as transformers does it, and back."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from agentpref.learn.kernels.rotary import Turn, rotate


def heads_and_turn():
    torch.manual_seed(0)
    angles = torch.randn(2, 5, 4)
    angles = torch.cat([angles, angles], -1)
    return torch.randn(2, 5, 3, 8), Turn(angles.cos(), angles.sin())


def test_heads_are_turned_as_llamas_are():
    x, turn = heads_and_turn()
    expected, _ = apply_rotary_pos_emb(x, x, turn.cos, turn.sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, turn), expected)


def test_turning_back_undoes_it():
    x, turn = heads_and_turn()
    torch.testing.assert_close(rotate(rotate(x, turn), turn.back()), x)


def test_it_can_be_written_into_memory_that_is_there():
    x, turn = heads_and_turn()
    wide = torch.zeros(2, 5, 4, 8)
    rotate(x, turn, out=wide[:, :, :3])
    torch.testing.assert_close(wide[:, :, :3], rotate(x, turn))
    assert not wide[:, :, 3].any()
