"""Both layouts must give the log-probs of plain, unpadded, one-row-at-a-time passes."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from agentpref.learn import logps
from agentpref.learn.batch import chunks, plain, shared
from agentpref.learn.encode import EncodedPair
from agentpref.types import Pair, Prompt

SHAPE = {
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
PAIR = Pair("p", "n", 0.0, Prompt("q", ()), {}, {}, "comparison")
ROWS = [
    EncodedPair(PAIR, (5, 6, 7, 8), (9, 10), (11, 12, 13)),
    EncodedPair(PAIR, (5,), (14,), (15, 0, 16, 17)),
    EncodedPair(PAIR, (18, 19, 20, 21, 22, 23), (24, 25, 26), (24, 27)),
]


def random_model(kind: str):
    torch.manual_seed(0)
    configs = {
        "llama": lambda: tf.LlamaConfig(**SHAPE),
        "qwen2": lambda: tf.Qwen2Config(**SHAPE),
        "qwen3": lambda: tf.Qwen3Config(**SHAPE, head_dim=8),
        "mistral": lambda: tf.MistralConfig(**SHAPE, sliding_window=None),
        "sliding": lambda: tf.MistralConfig(**SHAPE, sliding_window=3),
        "gpt2": lambda: tf.GPT2Config(
            vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4
        ),
    }
    model = tf.AutoModelForCausalLM.from_config(configs[kind]()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def one_by_one(model, prompt, completion) -> float:
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


def truth(model):
    with torch.no_grad():
        return [
            (one_by_one(model, r.prompt, r.chosen), one_by_one(model, r.prompt, r.rejected))
            for r in ROWS
        ]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "sliding", "gpt2"])
def test_plain_rows_score_like_single_passes(kind):
    model = random_model(kind)
    found = logps.score(model, ROWS, layout=plain, pad=0)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(truth(model)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_shared_rows_score_like_single_passes(kind):
    model = random_model(kind)
    found = logps.score(model, ROWS, layout=shared, pad=0)
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(truth(model)), atol=1e-4, rtol=1e-4
    )


def test_trusted_layout_is_shared_where_it_agrees():
    assert logps.trusted_layout(random_model("llama"), ROWS, pad=0) is shared


def test_trusted_layout_is_plain_where_a_model_reads_the_mask_differently():
    assert logps.trusted_layout(random_model("sliding"), ROWS, pad=0) is plain


def test_gradients_of_both_layouts_agree():
    gradients = []
    for layout in (plain, shared):
        model = random_model("llama")
        batch = layout(ROWS, 0)
        logps.sequence_logps(logps.completion_logits(model, batch), batch).sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_chunks_keep_order_and_budget():
    runs = list(chunks(ROWS * 4, 24))
    assert [row for run in runs for row in run] == ROWS * 4
    assert all(len(run) == 1 or len(run) * max(r.width for r in run) <= 24 for run in runs)
