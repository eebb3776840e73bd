"""Shapes of the models that are trained, and folders of random weights of these shapes.

Also counts what a shape costs: its linear layers are where nearly all arithmetic is done. Knows
nothing of jobs and trainers.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP; embeddings are tied."""

    family: Literal["llama", "qwen2"]
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer in a block; LoRA is put on all of them."""
        kv = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def parameters(self) -> int:
        """Parameters of the base model."""
        linear = sum(i * o for i, o in self.linears().values())
        biases = self.hidden + 2 * self.kv_heads * self.head_dim if self.family == "qwen2" else 0
        norms = 2 * self.hidden
        return self.vocab * self.hidden + self.layers * (linear + biases + norms) + self.hidden


SHAPES = {
    "nano": Shape("llama", 32, 2, 64, 4, 2, 4096),  # for tests: nothing is measured on it
    "tiny": Shape("llama", 192, 6, 576, 4, 2, 4096),  # the bundled model
    "small": Shape("llama", 256, 6, 704, 8, 4, 8192),
    "large": Shape("llama", 576, 30, 1536, 9, 3, 49152),  # SmolLM-135M
    "0.5b": Shape("qwen2", 896, 24, 4864, 14, 2, 151936),  # Qwen2.5-0.5B
    "1.5b": Shape("qwen2", 1536, 28, 8960, 12, 2, 151936),  # Qwen2.5-1.5B
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make(name: str, folder: Path, *, seed: int = 0) -> None:
    """Write a model of random weights in float32, with the bundled model's tokenizer.

    The tokenizer is there because trainers ask for one; token ids are drawn from the model's own
    vocabulary and never pass through it.
    """
    import torch
    import transformers

    from agentpref.models.base import BUNDLED, find_base

    folder.mkdir(parents=True, exist_ok=True)
    for file in _TOKENIZER_FILES:
        shutil.copy(find_base(BUNDLED) / file, folder)
    torch.manual_seed(seed)
    automatic: Any = transformers.AutoModelForCausalLM
    model = automatic.from_config(_config(SHAPES[name]))
    model.save_pretrained(folder)


def _config(shape: Shape) -> object:
    import transformers

    kinds = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return kinds[shape.family](
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def lora_shapes(shape: Shape, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names, as peft saves them, and shapes of the tensors of a LoRA on all linear layers."""
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.linears().items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{part}.{name}"
            yield f"{stem}.lora_A.weight", (rank, inputs)
            yield f"{stem}.lora_B.weight", (outputs, rank)


def main() -> None:
    """Make one model: a process of its own, so that the parent never imports torch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    make(options.name, options.folder)


if __name__ == "__main__":
    main()
