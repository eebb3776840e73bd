"""Arithmetic of a model that is held in bfloat16: how it is trained, and float32 to judge it by.

In training, products run in bfloat16; between them, the residual stream, norms, softmax and sums
are in float32, as under torch's autocast. The weights stay in bfloat16. A model in float32 is left
as it is by both contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_NARROW = (torch.bfloat16, torch.float16)
_READS_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


@contextmanager
def mixed(model: Any) -> Iterator[None]:
    """Run a model with float32 around products of its own dtype.

    Embeddings come out in float32, so all that is added to them is; autocast casts what enters a
    product.
    """
    dtype = model.dtype
    if dtype not in _NARROW:
        yield
        return
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: output.float())
    try:
        with torch.autocast(model.device.type, dtype):
            yield
    finally:
        hook.remove()


@contextmanager
def exact(model: Any) -> Iterator[None]:
    """Run a model in float32 with the weights that it has.

    Each weight is widened when it is read, one at a time, so no second model is held. This is slow
    and takes no gradients.
    """
    if model.dtype not in _NARROW:
        yield
        return
    with torch.no_grad(), _Widened():
        yield


class _Widened(TorchFunctionMode):
    """Every function of torch gets float32 in place of narrower numbers, and sees that dtype."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.embedding:  # rows of a large table: widened when used
            return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args)
            return _widen(found) if func == _READS_DTYPE else found
        args, kwargs = tree_map(_widen, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _NARROW else value
    narrow = isinstance(value, torch.Tensor) and value.dtype in _NARROW
    return value.float() if narrow else value
