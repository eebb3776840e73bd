"""Tiny random models of common families with a random LoRA adapter, and rows to score on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers as tf

from agentpref.learn.adapter import adaptable_layers


class Row(NamedTuple):
    """A prompt and its completions, as learn.batch.Sequences asks for them."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[bool, ...] | None, ...]

    @property
    def width(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


def row(prompt, *completions, masks=None) -> Row:
    return Row(prompt, completions, masks or (None,) * len(completions))


ROWS = [
    row((5, 6, 7, 8), (9, 10), (11, 12, 13)),
    row((5,), (14,), (15, 0, 16, 17)),
    row((18, 19, 20, 21, 22, 23), (24, 25, 26), (24, 27)),
]


def rows_of(n: int) -> list[Row]:
    """Three rows with n completions each."""
    parts = [(28, 29), (30,), (31, 32, 33, 34)]
    made = [(*own.completions, *((*part, at) for at, part in enumerate(parts))) for own in ROWS]
    return [row(own.prompt, *many[:n]) for own, many in zip(ROWS, made, strict=True)]


_SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_HEADS = {**_SHAPE, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2}
_NARROW_EXPERTS = {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}

FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**_SHAPE),
    "qwen2": lambda: tf.Qwen2Config(**_SHAPE),
    "qwen3": lambda: tf.Qwen3Config(**_HEADS),
    "mistral": lambda: tf.MistralConfig(**_SHAPE, sliding_window=None),
    "mistral, window": lambda: tf.MistralConfig(**_SHAPE, sliding_window=3),
    "mistral, wide window": lambda: tf.MistralConfig(**_SHAPE, sliding_window=10),
    "gemma": lambda: tf.GemmaConfig(**_HEADS),
    "gemma2": lambda: tf.Gemma2Config(**_HEADS, sliding_window=4),
    "gemma3": lambda: tf.Gemma3TextConfig(**_HEADS, sliding_window=4),
    "phi": lambda: tf.PhiConfig(**_SHAPE),
    "phi3": lambda: tf.Phi3Config(**_SHAPE, sliding_window=None),
    "gpt2": lambda: tf.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**{**_SHAPE, "num_key_value_heads": None}),
    "olmo2": lambda: tf.Olmo2Config(**_SHAPE),
    "granite": lambda: tf.GraniteConfig(**_SHAPE, logits_scaling=4.0),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "mixtral": lambda: tf.MixtralConfig(**_SHAPE, **_EXPERTS, num_local_experts=4),
    "olmoe": lambda: tf.OlmoeConfig(**_SHAPE, **_EXPERTS, num_experts=4),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **_SHAPE, **_NARROW_EXPERTS, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_HEADS, **_NARROW_EXPERTS),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **{**_HEADS, "num_hidden_layers": 4},  # three layers of linear attention, one of plain
        **_NARROW_EXPERTS,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **_HEADS, **_EXPERTS, num_local_experts=4, sliding_window=4, rope_parameters=_ROPE
    ),
    "gemma3, with images": lambda: tf.Gemma3Config(
        text_config={
            **_HEADS,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**_TOWER, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=47,
        boi_token_index=48,
        eoi_token_index=49,
    ),
    "qwen2.5, with images": lambda: tf.Qwen2_5_VLConfig(
        text_config={**_SHAPE, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=46,
        vision_end_token_id=47,
        image_token_id=48,
        video_token_id=49,
    ),
}

MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss")
"""Families whose layers hold several experts."""

CONDITIONAL = ("gemma3, with images", "qwen2.5, with images")
"""Families of a language model beside a tower for images, with more layers in the tower."""


def random_model(family: str):
    """A model of a family with random weights, large enough that every part has an effect."""
    torch.manual_seed(0)
    kind = tf.AutoModelForImageTextToText if family in CONDITIONAL else tf.AutoModelForCausalLM
    model = kind.from_config(FAMILIES[family]()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False)


def adapted_model(family: str):
    """Such a model with a random peft adapter, ``candidate``, on all linear layers."""
    from peft import LoraConfig, get_peft_model

    base = random_model(family)
    targets = adaptable_layers(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, "candidate").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def held_in(family: str, dtype: torch.dtype):
    """An adapted model whose base is held in a dtype; its adapter is in float32."""
    model = adapted_model(family)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model
