"""What the integrations cost the apps that they are plugged into.

    python -m benchmarks.integrations                    all of them
    python -m benchmarks.integrations gateway openai     some

`openai` and `langchain` take the calling thread's own processor time, so that other work on the
machine counts only for the caches and the cores that it shares. `gateway` takes time by the clock
between three processes, and wants an idle machine. An integration whose package is not installed
is skipped with a message. The last line is the report.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from benchmarks._report import Target, at_most, print_report


class Integration(NamedTuple):
    """The module that measures one, the package that it needs, and the most that is promised."""

    module: str
    needs: str
    limits: dict[str, float]


INTEGRATIONS = {
    "openai": Integration("openai_client", "openai", {"openai_call_added_us": 30}),
    "langchain": Integration(
        "langchain_callback", "langchain_core", {"langchain_run_added_us": 50}
    ),
    "gateway": Integration(
        "gateway",
        "starlette",
        {
            "gateway_added_p50_ms": 1,
            "gateway_added_p99_ms": 5,
            "gateway_first_token_added_ms": 3,
            "gateway_streams_not_whole": 0,
        },
    ),
}
"""What is measured; an integration is one line here and a module beside this one."""


def main() -> None:
    """Measure, print a line for each figure, and end with the JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.integrations", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(INTEGRATIONS)}")
    parser.add_argument("--calls", type=int, default=2_000, help="calls timed in a measurement")
    options = parser.parse_args()
    if unknown := set(options.names) - INTEGRATIONS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    figures: dict[str, float] = {}
    targets: list[Target] = []
    for name in options.names or INTEGRATIONS:
        integration = INTEGRATIONS[name]
        if find_spec(integration.needs) is None:
            print(f"{name} is skipped: pip install 'agentpref[{name}]'")
            continue
        measuring = import_module(f"benchmarks.integrations.{integration.module}")
        found = measuring.measure(options.calls)
        for figure, value in found.items():
            print(f"{figure:<32} {value:10.2f}", flush=True)
        figures |= found
        targets += [at_most(key, found[key], limit) for key, limit in integration.limits.items()]
    print_report("integrations", figures, targets)


if __name__ == "__main__":
    main()
