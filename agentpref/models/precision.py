"""In what numbers a base model is held and computed with, chosen by the machine and said.

bfloat16 halves memory and, where the processor multiplies it natively, more than doubles the speed
of matrices; elsewhere it is emulated and slower than float32. Adapters and optimizers stay in
float32 whatever the base is in. Knows nothing of models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from agentpref.errors import MissingDependency, UnsupportedModel

if TYPE_CHECKING:
    from agentpref.config import Precision

Held: TypeAlias = Literal["float32", "bfloat16", "4bit"]
"""What a loaded base is held in."""


def choose(asked: Precision, *, gpu: bool) -> Held:
    """Settle on a precision; ``"auto"`` is bfloat16 where that is native, else float32.

    Raises:
        MissingDependency: 4 bits need bitsandbytes.
        UnsupportedModel: 4 bits need a GPU.
    """
    if asked == "auto":
        return "bfloat16" if native_bfloat16(gpu=gpu) else "float32"
    if asked == "4bit":
        _require_4bit(gpu)
    return asked


def native_bfloat16(*, gpu: bool) -> bool:
    """Whether this machine multiplies matrices of bfloat16 without emulation."""
    import torch

    if gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Any = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 has it, 2.8 does not
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("arm_bf16"))


def loading(held: Held) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is told."""
    import torch

    if held != "4bit":
        return {"dtype": getattr(torch, held)}
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"dtype": torch.bfloat16, "quantization_config": quantized}


def _require_4bit(gpu: bool) -> None:
    if not gpu:
        raise UnsupportedModel(
            "precision is '4bit', which needs a GPU; use 'auto', 'bfloat16' or 'float32' here"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "precision is '4bit', which needs bitsandbytes; install it with: "
            "pip install 'agentpref[quantized]'"
        ) from error
