"""One night of ours: ``agentpref update`` on a home, from process start to a published revision.

It does what the command does. The verdict rests on a loose gate, and a revision with too little
evidence is promoted all the same: what is measured is a week that goes on, and the gate costs the
same whatever it says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import agentpref
from agentpref.config import GateSettings, UpdateConfig
from agentpref.learn.process import settling

LOOSE = GateSettings(
    retention_margin=1.0, kl_budget=100.0, distinct_floor=0.0, length_ratio=(1e-6, 1e6)
)


def night(home: Path) -> dict[str, Any]:
    """Run one update, and make what came of it live."""
    config = UpdateConfig(epochs=1, gate=LOOSE)
    report = agentpref.update(home, model="tiny", config=config, progress=settling(None))
    if report.verdict != "promoted" and report.revision is not None:
        agentpref.Registry(home).promote(report.revision)
    after = {tag: found["after"] for tag, found in report.accuracy.items() if "after" in found}
    return {"verdict": report.verdict, "counts": report.counts, "accuracy": after}


def main() -> None:
    """Run one night."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    (options.out / "result.json").write_text(json.dumps(night(options.home)), "utf-8")


if __name__ == "__main__":
    main()
