"""Is every reply right while revisions are swapped under load, and how long do requests wait?

Run as ``OMP_NUM_THREADS=1 python -m benchmarks.swap`` (about three minutes for each engine; ``make
test-vllm`` makes the environment that vLLM runs in; beside other work, small models are slower in
two threads). Four clients send requests without a pause, two of them streaming. Every reply is
compared with the greedy answer of the revision that it names, computed beforehand by plain
transformers and peft. Windows with swaps and without alternate. The last line is one JSON object;
the exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks._report import Target, print_report
from benchmarks.swap import in_process, load, vllm
from benchmarks.swap.stage import MAX_TOKENS, build

ADAPTERS = 4
_VLLM_PYTHON = ".venv-vllm/bin/python"
_LIBRARIES = ("torch", "transformers", "peft")


def main() -> None:
    """Measure the chosen engines, and print the JSON object last."""
    options, engines, base = _options()
    found: dict[str, Any] = {"libraries": {name: version(name) for name in _LIBRARIES}}
    promised: list[Target] = []
    for engine in engines:
        with tempfile.TemporaryDirectory() as root:
            stage = build(Path(root), base, ADAPTERS)
            with engine.serve(stage) as router:
                figures = load.figures(load.run(stage, router, options))
            promised += load.targets(engine.name, figures, options, engine.activation)
            figures["prompt_tokens"] = [min(stage.lengths), max(stage.lengths)]
            figures["prompts"], figures["left_out"] = len(stage.prompts), stage.left_out
            for rival in engine.rivals:
                figures[rival.name] = rival.measure(stage, options)
            _say(engine.name, figures)
            found[engine.name] = figures
    found |= {"clients": options.clients, "seconds": options.seconds, "max_tokens": MAX_TOKENS}
    print_report("swap", found, promised)
    sys.exit(0 if all(target.holds for target in promised) else 1)


def _say(name: str, figures: Mapping[str, Any]) -> None:
    print(f"{name}:")
    for key, value in figures.items():
        print(f"  {key:22} {value}")


def _options() -> tuple[load.Options, list[load.Engine], str]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.swap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=["transformers", "vllm", "all"], default="all")
    parser.add_argument("--seconds", type=float, default=60, help="with swaps; half of it without")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--model", default="tiny", help="a bundled name or a folder")
    parser.add_argument(
        "--vllm-python",
        metavar="FILE",
        default=_VLLM_PYTHON if Path(_VLLM_PYTHON).exists() else None,
        help=f"the interpreter that has vLLM (default: {_VLLM_PYTHON} after make test-vllm)",
    )
    asked = parser.parse_args()
    engines = [in_process.ENGINE, vllm.engine(asked.vllm_python)]
    if asked.engine != "all":
        engines = [engine for engine in engines if engine.name == asked.engine]
    return load.Options(asked.seconds, asked.clients, asked.swaps), engines, asked.model


if __name__ == "__main__":
    main()
