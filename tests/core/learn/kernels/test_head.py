"""The fused output layer gives log-probs, KL and gradients of the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentpref.learn.kernels import head as heads
from agentpref.learn.kernels.head import Head, read, read_logits, token_kl

VOCABULARY = 23


def make(count, seed=0, bias=False):
    torch.manual_seed(seed)
    hidden, live = (torch.randn(count, 6, requires_grad=True) for _ in range(2))
    head = Head(torch.randn(VOCABULARY, 6), torch.randn(VOCABULARY) if bias else None)
    return hidden, head, torch.randint(0, VOCABULARY, (count,)), live


def plain(hidden, head, targets, live):
    logps, theirs = (
        torch.nn.functional.linear(x, head.weight, head.bias).log_softmax(-1)
        for x in (hidden, live)
    )
    kl = (theirs.exp() * (theirs - logps)).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], kl


@given(
    count=st.integers(1, 40), chunk=st.integers(1, 400), bias=st.booleans(), seed=st.integers(0, 9)
)
def test_values_and_gradients_are_the_plain_ones_for_any_size_of_chunk(count, chunk, bias, seed):
    hidden, head, targets, live = make(count, seed, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "LOGITS_PER_CHUNK", chunk)
        patch.setattr(heads, "LEAST_POSITIONS", 1)
        found = read(hidden, head, targets, live=live)[:2]
    expected = plain(hidden, head, targets, live.detach())
    weights = torch.randn(2, count)
    gradients = [
        torch.autograd.grad((pair[0] * weights[0] + pair[1] * weights[1]).sum(), hidden)[0]
        for pair in (found, expected)
    ]
    for mine, other in zip((*found, gradients[0]), (*expected, gradients[1]), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_live_gets_no_gradient():
    hidden, head, targets, live = make(5)
    kl = read(hidden, head, targets, live=live).kl
    kl.sum().backward()
    assert live.grad is None
    assert hidden.grad is not None


def test_without_live_there_is_no_kl():
    hidden, head, targets, _ = make(5)
    found = read(hidden, head, targets)
    assert found.kl is found.collision is None


def test_the_kl_of_a_policy_from_itself_is_zero():
    hidden, head, targets, _ = make(9)
    kl = read(hidden, head, targets, live=hidden.detach()).kl
    torch.testing.assert_close(kl, torch.zeros(9), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_no_tensor_of_the_vocabularys_size_is_kept_for_the_backward_pass():
    hidden, head, targets, live = make(40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        read(hidden, head, targets, live=live)
    assert kept == [hidden.shape, hidden.shape]


def test_collision_is_the_probability_that_two_draws_agree():
    hidden, head, targets, _ = make(9)
    found = read(hidden, head, targets, collision=True).collision
    probs = (hidden @ head.weight.T).softmax(-1)
    torch.testing.assert_close(found, probs.square().sum(-1).log())
    assert not found.requires_grad


def test_chunks_have_many_positions_even_with_a_large_vocabulary(monkeypatch):
    sizes = []
    right = heads._Softmax.of
    monkeypatch.setattr(heads, "LOGITS_PER_CHUNK", 1)
    monkeypatch.setattr(
        heads._Softmax, "of", lambda self, x, *at: (sizes.append(len(x)), right(self, x, *at))[1]
    )
    hidden, head, targets, _ = make(200)
    read(hidden, head, targets)
    assert sizes == [96, 96, 8]


def test_logits_are_read_as_hidden_states_are():
    hidden, head, targets, live = make(9, bias=True)
    expected = read(hidden, head, targets, live=live, collision=True)
    logits, live_logits = (torch.nn.functional.linear(x, *head) for x in (hidden, live))
    found = read_logits(logits, targets, live=live_logits, collision=True)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)
    assert read_logits(logits, targets)[1:] == (None, None)


def test_token_kl_by_hand():
    live, candidate = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_kl(live, candidate).item() == pytest.approx(expected)


def test_token_kl_of_equals_is_zero():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert token_kl(logits, logits + 3.0).abs().max().item() < 1e-6


def test_the_logit_of_a_target_is_not_rounded_with_the_product():
    """A log-prob is the difference of two numbers, here of about 100."""
    hidden, head, targets, _ = make(50)
    hidden = hidden.detach().bfloat16()
    head = Head(head.weight.bfloat16(), torch.full((VOCABULARY,), 100.0).bfloat16())
    logits = hidden.float() @ head.weight.float().T + 100
    true = read_logits(logits, targets).logps
    fused = (read(hidden.float(), head, targets).logps - true).abs().mean()
    rounded = (read_logits(logits.bfloat16(), targets).logps - true).abs().mean()
    assert fused < 0.8 * rounded


def test_hidden_states_may_be_wider_than_the_head():
    hidden, head, targets, _ = make(20)
    narrow = Head(head.weight.bfloat16())
    wide = Head(narrow.weight.float())
    expected, found = (read(hidden, own, targets).logps for own in (wide, narrow))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
    weights = torch.linspace(-1, 1, 20)
    (true,), (grad,) = (torch.autograd.grad((x * weights).sum(), hidden) for x in (expected, found))
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, true, atol=0.05, rtol=0.05)
