"""The engine inside the process, and peft's way to swap.

``hotswap_adapter`` writes the new adapter's weights over the old one's, in place, while threads
generate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from agentpref.models.base import load_base
from agentpref.serve.router import Router
from agentpref_adapters.transformers import open_router
from benchmarks.swap import rival
from benchmarks.swap.load import Engine, Options, Rival
from benchmarks.swap.stage import MAX_TOKENS, Ids, Stage, encoded


@contextmanager
def serve(stage: Stage) -> Iterator[Router]:
    """Serve the stage's home from this process."""
    with open_router(stage.home, stage.base) as router:
        yield router


def hotswap(stage: Stage, options: Options) -> Mapping[str, Any]:
    """Swap by ``hotswap_adapter``, as peft's documentation shows."""
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    base = load_base(stage.base)
    model: Any = PeftModel.from_pretrained(base.model, str(stage.folders[0]))

    def swap(adapter: int) -> None:
        hotswap_adapter(model, str(stage.folders[adapter]), adapter_name="default")

    def answer(prompt: str) -> Ids:
        inputs = encoded(base, prompt)
        ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return tuple(ids[0, inputs["input_ids"].shape[1] :].tolist())

    return rival.measure(stage, options, swap=swap, answer=answer)


ENGINE = Engine("transformers", serve, activation=1.0, rivals=(Rival("hotswap", hotswap),))
