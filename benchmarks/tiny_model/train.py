"""Tokenizer and weights of the bundled model, from scratch, on a CPU.

Plain next-token training of a small Llama with tied embeddings on the corpus of this package, in
batches of conversations of like length.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.tiny_model import corpus

VOCABULARY = 4096
TOKENS_PER_BATCH = 2048
DIALOGUES_PER_EPOCH = 8000
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)
UNLEARNED = -100  # what transformers leaves out of the loss

Row = tuple[list[int], list[int]]  # token ids and labels


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of :data:`VOCABULARY` tokens that ends a turn with ``<|im_end|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text()
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3.4 million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, epochs: int, seed: int
) -> float:
    """Train in place for a number of epochs; return the mean loss of the last hundred steps."""
    rng, spoken = random.Random(seed), corpus.statements()
    plan = [b for _ in range(epochs) for b in batches(rng, encode(rng, tokenizer, spoken))]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate(i, len(plan)))
    losses: list[float] = []
    bar = tqdm(plan, unit="batch")
    for rows in bar:
        losses.append(step(model, rows, tokenizer.pad_token_id))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.3f}", refresh=False)
    return sum(losses[-100:]) / len(losses[-100:])


def rate(step: int, steps: int, peak: float = 3e-3, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def step(model: LlamaForCausalLM, rows: list[Row], pad: int) -> float:
    """Forward and backward over one padded batch; return its mean loss per learned token."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([kept + [UNLEARNED] * (width - len(kept)) for _, kept in rows])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=labels).loss  # right padding: no mask is needed
    loss.backward()
    return float(loss.detach())


def encode(rng: random.Random, tokenizer: PreTrainedTokenizerFast, spoken: list[str]) -> list[Row]:
    """One epoch of conversations; of dialogues and echoes only the answers are learned."""
    rows = corpus.epoch(rng, spoken, DIALOGUES_PER_EPOCH)
    texts = [
        str(tokenizer.apply_chat_template(r["messages"], tools=r["tools"], tokenize=False))
        for r in rows
    ]
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    encoded: list[Row] = []
    for row, text, ids, offsets in zip(
        rows, texts, found["input_ids"], found["offset_mapping"], strict=True
    ):
        spans = [(0, len(text))] if row["read"] else [m.span() for m in ANSWER.finditer(text)]
        starts = (any(a <= start < b for a, b in spans) for start, _ in offsets)
        labels = [i if kept else UNLEARNED for i, kept in zip(ids, starts, strict=True)]
        encoded.append((ids, labels))
    return encoded


def batches(rng: random.Random, rows: list[Row]) -> list[list[Row]]:
    """Group rows of like length into batches of about :data:`TOKENS_PER_BATCH`, then shuffle."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row[0])):
        if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > TOKENS_PER_BATCH:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    return groups
