"""Attention of shared rows equals torch's own with a dense mask, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from agentpref.learn.kernels import attention, blocks
from agentpref.learn.kernels.attention import Turn, rotate

LOWEST = torch.finfo(torch.float32).min


def inputs(rows, heads, prompt, width, n=2):
    torch.manual_seed(0)
    shape = (rows, heads, prompt + n * width, 8)
    return [torch.randn(shape, requires_grad=True) for _ in range(3)]


def padding(lengths, prompt, n=2):
    hidden = torch.arange(prompt) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, LOWEST)
    return mask[:, None, None].expand(-1, n, -1, -1)


def dense(query, key, value, mask, scale):
    """The definition: one softmax over a full matrix, with a mask for what is hidden."""
    n, prompt, total = mask.shape[1], mask.shape[-1], query.shape[2]
    part = (torch.arange(total) - prompt).div((total - prompt) // n, rounding_mode="floor")
    other = (part[:, None] != part) & (torch.arange(total) >= prompt)
    seen = torch.full((total, total), LOWEST).triu(1).masked_fill(other, LOWEST)
    seen = seen.expand(len(query), 1, total, total).clone()
    seen[:, :, :, :prompt] += mask[:, :1]
    seen.diagonal(dim1=-2, dim2=-1).zero_()  # padding sees itself, and no token sees padding
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def real(lengths, prompt, width, n=2):
    """Where there is a token or part of a completion; the prompts' padding may hold anything."""
    tokens = torch.arange(prompt) < torch.tensor(lengths)[:, None]
    return torch.cat([tokens, torch.ones(len(lengths), n * width, dtype=torch.bool)], 1)


def with_gradients(attend, tensors, mask, places):
    out = attend(*tensors, mask, 0.3).transpose(1, 2)[places]
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("attend", [attention.shared_attention, attention.composed_attention])
@given(
    prompt=st.integers(1, 9),
    width=st.integers(1, 7),
    n=st.integers(1, 5),
    heads=st.integers(1, 3),
    data=st.data(),
)
def test_values_and_gradients_are_those_of_a_dense_mask(attend, prompt, width, n, heads, data):
    lengths = data.draw(st.lists(st.integers(1, prompt), min_size=1, max_size=3))
    tensors, mask = inputs(len(lengths), heads, prompt, width, n), padding(lengths, prompt, n)
    places = real(lengths, prompt, width, n)
    expected = with_gradients(dense, tensors, mask, places)
    for mine, other in zip(with_gradients(attend, tensors, mask, places), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-4)


def test_a_completion_sees_nothing_of_the_others():
    query, key, value = inputs(1, 2, 4, 3, n=3)
    mask = padding([4], 4, n=3)
    before = attention.shared_attention(query, key, value, mask, 0.3)
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[:, :, 4:7] += 5
    after = attention.shared_attention(query, key, value, mask, 0.3)
    assert torch.equal(before[:, :, 7:], after[:, :, 7:])
    assert not torch.allclose(before[:, :, 4:7], after[:, :, 4:7])


@pytest.fixture
def backward_calls(monkeypatch):
    """Of each call of the kernel's backward pass: keys, their heads and their dtype."""
    calls, right = [], blocks._kernel_backward

    def spy(block, heads, seen, scale):
        calls.append((heads[1].shape[2], heads[1].shape[1], heads[1].dtype))
        return right(block, heads, seen, scale)

    monkeypatch.setattr(blocks, "_kernel_backward", spy)
    return calls


def test_bfloat16_is_exact_to_its_rounding_and_its_gradients_are_computed_in_float32(
    backward_calls,
):
    wide = inputs(2, 2, 6, 4)
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    exact = [x.detach().float().requires_grad_() for x in narrow]
    mask, places = padding([6, 3], 6), real([6, 3], 6, 4)
    found = with_gradients(attention.shared_attention, narrow, mask.bfloat16(), places)
    expected = with_gradients(attention.shared_attention, exact, mask, places)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), other, atol=2e-2, rtol=2e-2)
    assert {dtype for _, _, dtype in backward_calls} == {torch.float32}


def test_gradients_of_long_prompts_with_wide_heads_are_computed_in_bfloat16(backward_calls):
    torch.manual_seed(0)
    narrow = [
        torch.randn(1, 2, 512 + 32, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]
    exact = [x.detach().float().requires_grad_() for x in narrow]
    mask, places = padding([512], 512), real([512], 512, 16)
    attend = attention.shared_attention
    found = with_gradients(attend, narrow, mask.bfloat16(), places)
    dtypes = [dtype for _, _, dtype in backward_calls]
    assert dtypes == [torch.bfloat16, *[torch.float32] * 3], "the prompt's block, then the others"
    expected = with_gradients(attend, exact, mask, places)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), other, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize(("threads", "key_heads"), [(1, 2), (8, 6)])
def test_query_heads_share_key_heads_if_there_are_enough_for_all_threads(
    threads, key_heads, backward_calls
):
    query, key, value = inputs(2, 6, 5, 3)
    few = [x[:, :2].detach().requires_grad_() for x in (key, value)]
    mask, places = padding([5, 4], 5), real([5, 4], 5, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = with_gradients(attention.shared_attention, [query, *few], mask, places)
    finally:
        torch.set_num_threads(before)
    assert {heads for _, heads, _ in backward_calls} == {key_heads}
    spread = [x.detach().repeat_interleave(3, 1).requires_grad_() for x in few]
    expected = with_gradients(dense, [query, *spread], mask, places)
    expected[2:] = [x.unflatten(1, (2, 3)).sum(2) for x in expected[2:]]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-4)


def test_heads_are_repeated_if_the_kernel_cannot_share_them(monkeypatch):
    query, key, value = inputs(1, 4, 5, 3)
    mask = padding([5], 5)
    expected = attention.shared_attention(query, key[:, :2], value[:, :2], mask, 0.3)
    monkeypatch.setattr(attention, "grouping_kernel", lambda: False)
    found = attention.shared_attention(query, key[:, :2], value[:, :2], mask, 0.3)
    torch.testing.assert_close(found, expected)


def projection(rows, prompt, width, n):
    """Projected heads, four of queries and two of keys and values, and angles of positions."""
    torch.manual_seed(1)
    total = prompt + n * width
    projected = torch.randn(rows, total, 8 * 8, requires_grad=True)
    angles = torch.randn(rows, total, 4)
    angles = torch.cat([angles, angles], -1)
    return projected, Turn(angles.cos(), angles.sin())


def by_parts(projected, turn, mask):
    heads = projected.unflatten(-1, (8, 8)).transpose(1, 2)
    query, key, value = heads.split([4, 2, 2], 1)
    query, key = apply_rotary_pos_emb(query, key, turn.cos, turn.sin)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return dense(query, key, value, mask, 0.3).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("completions_only", [False, True])
@given(prompt=st.integers(1, 9), width=st.integers(1, 7), n=st.integers(1, 5), data=st.data())
def test_attention_of_one_projection_is_that_of_its_parts(completions_only, prompt, width, n, data):
    lengths = data.draw(st.lists(st.integers(1, prompt), min_size=1, max_size=3))
    projected, turn = projection(len(lengths), prompt, width, n)
    mask, places = padding(lengths, prompt, n), real(lengths, prompt, width, n)
    found = attention.rotary_attention(
        projected, turn, mask, (4, 2), 0.3, completions_only=completions_only
    )
    expected = by_parts(projected, turn, mask)
    if completions_only:
        expected, places = expected[:, prompt:], places[:, prompt:]
    assert found.shape == expected.shape
    sums = [(x[places] * torch.linspace(-1, 1, x.shape[-1])).sum() for x in (found, expected)]
    gradients = [torch.autograd.grad(total, projected)[0] for total in sums]
    torch.testing.assert_close(found[places], expected[places], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=5e-6, rtol=1e-4)


class Module:
    """The module that transformers passes; shared rows use nothing of it."""

    num_key_value_groups = 2
    is_causal = True


def test_transformers_can_call_it_with_grouped_heads():
    query, key, value = inputs(2, 4, 5, 3)
    few_keys, few_values = key[:, :2], value[:, :2]
    mask = padding([5, 4], 5)
    out, _ = attention.attention_forward(Module(), query, few_keys, few_values, mask, scaling=0.3)
    expected = dense(
        query, few_keys.repeat_interleave(2, 1), few_values.repeat_interleave(2, 1), mask, 0.3
    )
    places = real([5, 4], 5, 3)
    torch.testing.assert_close(out[places], expected.transpose(1, 2)[places], atol=1e-6, rtol=1e-4)


def test_plain_rows_get_torchs_own_attention():
    query, key, value = inputs(1, 2, 3, 2)
    out, _ = attention.attention_forward(Module(), query, key[:, :1], value[:, :1], None)
    expected = scaled_dot_product_attention(
        query, key[:, :1].repeat(1, 2, 1, 1), value[:, :1].repeat(1, 2, 1, 1), is_causal=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    "option",
    [
        {"softcap": 30.0},
        {"sliding_window": 17},
        {"dropout": 0.1},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_shared_rows_do_not_support_are_refused(option):
    query, key, value = inputs(1, 2, 32, 16)
    with pytest.raises(ValueError, match="shared attention does not support"):
        attention.attention_forward(Module(), query, key, value, padding([32], 32), **option)


def test_a_window_longer_than_all_rows_is_accepted():
    query, key, value = inputs(1, 2, 32, 16)  # as few as 17 and 1 of these may be tokens
    attention.attention_forward(Module(), query, key, value, padding([17], 32), sliding_window=18)


def heads_and_turn():
    torch.manual_seed(0)
    angles = torch.randn(2, 5, 4)
    angles = torch.cat([angles, angles], -1)
    return torch.randn(2, 5, 3, 8), Turn(angles.cos(), angles.sin())


def test_heads_are_rotated_like_llamas():
    x, turn = heads_and_turn()
    expected, _ = apply_rotary_pos_emb(x, x, turn.cos, turn.sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, turn), expected)


def test_rotating_back_undoes_it():
    x, turn = heads_and_turn()
    torch.testing.assert_close(rotate(rotate(x, turn), turn.back()), x)


def test_rotate_writes_into_given_memory():
    x, turn = heads_and_turn()
    wide = torch.zeros(2, 5, 4, 8)
    rotate(x, turn, out=wide[:, :, :3])
    torch.testing.assert_close(wide[:, :, :3], rotate(x, turn))
    assert not wide[:, :, 3].any()
