"""How well a bundled model copies: ``python -m benchmarks.tiny_model.copying`` (seconds).

It asks held-out requests, which no model of this package has read, and counts the answers that are
word for word right in one of the five styles, whatever the weather. Greedy, and drawn at .9.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentpref.prefer.examples import is_held_out
from benchmarks.tiny_model import corpus, dialogues, words
from benchmarks.tiny_model.__main__ import BUNDLED

REQUESTS, TEMPERATURE, MOST_TOKENS = 120, 0.9, 64
SKY = re.compile("|".join(words.SKIES))


def main() -> None:
    """Measure a folder's model, and print both shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    folder = parser.parse_args().model
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    asked = requests()
    prompts = tokenizer.apply_chat_template(
        [corpus.ask(request.text) for request in asked],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        f"at {TEMPERATURE}": {"do_sample": True, "temperature": TEMPERATURE},
    }
    for name, settings in ways.items():
        torch.manual_seed(0)
        written = model.generate(**prompts, **settings, max_new_tokens=MOST_TOKENS)
        texts = tokenizer.batch_decode(
            written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right = sum(map(is_right, asked, texts))
        print(f"{name}: {right} of {len(asked)} answers are word for word right")


def requests() -> list[dialogues.Request]:
    """Held-out requests, drawn with a seed of their own."""
    rng, found = random.Random("copy"), list[dialogues.Request]()
    while len(found) < REQUESTS:
        request = dialogues.draw_request(rng)
        if is_held_out(corpus.ask(request.text), corpus.SHARE):
            found.append(request)
    return found


def is_right(request: dialogues.Request, text: str) -> bool:
    """Whether a text is the answer to a request in one of the styles."""
    right = {SKY.sub("…", dialogues.answer(request, style)) for style in dialogues.STYLES}
    return SKY.sub("…", text.strip()) in right


if __name__ == "__main__":
    main()
