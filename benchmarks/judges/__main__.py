"""Can judges be trusted as far as their calibration says, and what does asking them cost?

    python -m benchmarks.judges                                all parts but the real model
    python -m benchmarks.judges --parts injection,null --weak  with SmolLM2-135M-Instruct
    python -m benchmarks.judges --parts noise --seeds 12

``statistics`` asks no model. ``throughput`` runs a server of its own, and wants a quiet machine.
``noise`` trains the bundled model, a minute or two for each seed, and keeps a JSON row of each
seed in ``--rows``: seeds that are there are not computed again. The last line of the output is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._report import Target, print_report
from benchmarks.judges import injection, noise, null, statistics, throughput

Part = Callable[[argparse.Namespace], tuple[dict[str, Any], list[Target]]]


def main() -> None:
    """Measure the parts that were asked for."""
    options = _options()
    os.nice(10)
    warnings.simplefilter("ignore", FutureWarning)  # of peft, at every training
    figures: dict[str, Any] = {}
    targets: list[Target] = []
    for name in options.parts:
        figures[name], promised = PARTS[name](options)
        shown = {k: v for k, v in figures[name].items() if k != "panel_on_llmbar"}
        print(f"{name}: {json.dumps(shown, ensure_ascii=False, indent=1)}")
        for one in promised:
            print(f"  {one.name}: {one.value:.3g} ({one.target}, {'holds' if one.holds else 'NO'})")
        targets += promised
    print_report("judges", figures, targets)


def _statistics(_: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    panel, coverage = statistics.panel_on_llmbar(), statistics.corrected_coverage()
    del panel["splits"]
    figures = {"panel_on_llmbar": panel, "corrected_coverage": coverage}
    return figures, statistics.targets(panel, coverage)


def _throughput(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    found = throughput.measure(options.seeds or 1)
    return found, throughput.targets(found)


def _injection(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    found = injection.measure(weak=options.weak)
    return found, injection.targets(found)


def _noise(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    found = noise.measure(options.rows, options.seeds or noise.SEEDS)
    return found, noise.targets(found)


def _null(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    found = null.measure(options.seeds or 5)
    return found, null.targets(found)


PARTS: dict[str, Part] = {
    "statistics": _statistics,
    "throughput": _throughput,
    "injection": _injection,
    "noise": _noise,
    "null": _null,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.judges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", type=_parts, default=[*PARTS], help="[default: all]")
    parser.add_argument("--seeds", type=int, help="seeds of each part that has some")
    parser.add_argument("--weak", action="store_true", help="also ask SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=Path, default=Path("judges_noise.jsonl"), metavar="FILE")
    return parser.parse_args()


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted({*names} - {*PARTS})
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


if __name__ == "__main__":
    main()
