"""Build the bundled model: ``python -m benchmarks.tiny_model`` (half an hour on two cores)."""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.tiny_model import corpus, train

BUNDLED = Path(__file__).parents[2] / "agentpref" / "bundled" / "tiny"


def main() -> None:
    """Train tokenizer and model from the seed, and save both in bf16 safetensors."""
    options = parse()
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    tokenizer = train.make_tokenizer(texts(rng))
    model = train.make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    loss = train.train(model, tokenizer, options.epochs, options.seed)
    print(f"loss of the last hundred batches: {loss:.4f} nats per token")
    save(model, tokenizer, options.out)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    return parser.parse_args()


def texts(rng: random.Random) -> Iterator[str]:
    """What the tokenizer learns its merges from: each message of one epoch, with its role."""
    for row in corpus.epoch(rng, corpus.statements(), train.DIALOGUES_PER_EPOCH):
        yield from (f"{m['role']}\n{m['content']}" for m in row["messages"])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save both in one folder, with the model card beside them."""
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = Path(__file__).parent / "MODEL_CARD.md"
    if card.exists():
        shutil.copy(card, out / "README.md")
    print(f"saved to {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
