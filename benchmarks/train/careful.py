"""The peer to beat: a careful loop over peft, from process start to a saved adapter.

    python -m benchmarks.train.careful JOB OUT [--dtype float32|bfloat16] [--micro N]

What somebody writes in an afternoon who knows what costs: the reference is computed once,
beforehand; the output layer runs on completion tokens only; weights are in bfloat16 where the
processor multiplies that, as ours are; nothing is logged. It does the job that the other arms do,
to the same result.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train import jobs
from benchmarks.train.ours import gpu_peak

DTYPES = ("auto", "float32", "bfloat16")


def run(folder: Path, out: Path, dtype: str, micro: int) -> dict[str, Any]:
    """Do the job; return loss and margin of each step, and where the time went after imports."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch.nn.functional import logsigmoid
    from transformers import AutoModelForCausalLM

    from agentpref.models.base import native_bfloat16

    started = time.perf_counter()
    job, rows = jobs.load_job(folder), jobs.load_rows(folder)
    gpu = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if native_bfloat16(gpu=gpu) else "float32"
    automatic: Any = AutoModelForCausalLM
    base = automatic.from_pretrained(job.base, dtype=getattr(torch, dtype))
    lora = LoraConfig(
        r=job.rank, lora_alpha=job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base.to("cuda" if gpu else "cpu"), lora)
    set_peft_model_state_dict(model, load_file(folder / "init.safetensors"))
    body, head = base.model, base.lm_head

    def logps(some: list[jobs.Ids]) -> Any:
        """Sums over completion tokens, (pairs, 2): chosen and rejected rows side by side."""
        sides = [(ids.prompt, answer) for ids in some for answer in (ids.chosen, ids.rejected)]
        width = max(len(prompt) + len(answer) for prompt, answer in sides)
        tokens = np.zeros((len(sides), width), np.int64)
        counts = np.zeros((len(sides), width), bool)
        for row, (prompt, answer) in enumerate(sides):
            end = len(prompt) + len(answer)
            tokens[row, :end] = (*prompt, *answer)
            counts[row, len(prompt) - 1 : end - 1] = True
        ids = torch.from_numpy(tokens).to(model.device)
        where = torch.from_numpy(counts).to(model.device)
        # Padding is on the right, where no token that counts can see it.
        states = body(input_ids=ids, use_cache=False).last_hidden_state[where]
        logits = head(states).float()
        found = logits.gather(-1, ids[:, 1:][where[:, :-1]][:, None])[:, 0] - logits.logsumexp(-1)
        owner, found = where.nonzero()[:, 0], found.double()  # sums of hundreds near −2,500
        return found.new_zeros(len(sides)).index_add(0, owner, found).view(-1, 2)

    def passes(numbers: Any) -> Any:
        return (numbers[start : start + micro] for start in range(0, len(numbers), micro))

    with torch.no_grad(), model.disable_adapter():
        numbers = [*range(len(rows))]
        reference = torch.cat([logps([rows[n] for n in some]) for some in passes(numbers)])
    ready = time.perf_counter()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=job.learning_rate, weight_decay=0.0)
    losses, margins = list[float](), list[float]()
    for step in range(job.steps):
        optimizer.param_groups[0]["lr"] = job.learning_rate * job.rate_factor(step)
        batch = job.order[step * job.batch_size : (step + 1) * job.batch_size]
        loss_sum = margin_sum = 0.0
        for some in passes(batch):
            ratios = logps([rows[n] for n in some]) - reference[list(some)]
            margin = ratios[:, 0] - ratios[:, 1]
            loss = -logsigmoid(job.beta * margin).sum() / job.batch_size
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach())
            margin_sum += float(margin.detach().sum()) / job.batch_size
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss_sum)
        margins.append(margin_sum)
    model.save_pretrained(out / "adapter")
    return {
        "losses": losses,
        "margins": margins,
        "load_s": ready - started,  # with the reference
        "work_s": time.perf_counter() - ready,
        "gpu_mb": gpu_peak(),
        "setting": f"{dtype}, micro-batch {micro}",
    }


def main() -> None:
    """Do one job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--micro", type=int, default=4)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options.job, options.out, options.dtype, options.micro)
    (options.out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
