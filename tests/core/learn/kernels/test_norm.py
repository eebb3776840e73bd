"""Normalisation: equal to its definition, in values and in gradients."""

from __future__ import annotations

import torch

from agentpref.learn.kernels.norm import rms_norm


def defined_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def check(mine, defined, *inputs):
    weights = torch.randn_like(defined)
    torch.testing.assert_close(mine, defined)
    for a, b in zip(
        torch.autograd.grad((mine * weights).sum(), inputs),
        torch.autograd.grad((defined * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rms_norm_is_its_definition():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8)
    check(rms_norm(x, weight, 1e-5), defined_norm(x, weight, 1e-5), x)


def test_rms_norm_of_zeros_is_zero():
    x = torch.zeros(1, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 4))
    assert torch.isfinite(x.grad).all()


def test_the_dtype_is_kept():
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-6).dtype == torch.bfloat16
