"""A nightly update in one script: train, act on the verdict, and let a running router follow.

    python examples/nightly_update.py --model tiny [--home HOME]

It exits as `agentpref update` does: 0 promoted or passed, 3 nothing new or to gain, 4 refused, 5
too little evidence, 6 nothing usable, 7 cut short by a limit of time. In production the update runs
from cron, and the router in the server, which follows within two seconds; `router.sync()` follows
at once.
"""

from __future__ import annotations

import argparse
import sys

import agentpref
from agentpref_adapters.transformers import open_router

EXIT_CODES = {
    "promoted": 0, "passed": 0, "nothing_new": 3, "nothing_to_gain": 3, "refused": 4,
    "insufficient": 5, "nothing_usable": 6, "cut_short": 7,
}  # fmt: skip


def update(home: str, model: str) -> int:
    """Run one update beside a router that serves, and return the exit code."""
    with open_router(home, model=model) as router:
        report = agentpref.update(home, model=model)
        print(f"{report.verdict}: {report.counts.get('new', 0)} new pairs")
        for reason in report.reasons:
            print(f"  {reason}")
        print(f"serving: {router.sync().live or 'the base model'}")
        return EXIT_CODES[report.verdict]


def main() -> int:
    """Read the command line; print an error of agentpref as one line and return 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", default="./.agentpref")
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    try:
        return update(options.home, options.model)
    except agentpref.AgentprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
