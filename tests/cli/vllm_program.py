"""Stands in for vLLM's server program: `python vllm_program.py … --model BASE … --port PORT …`.

It prints what it is asked to load and unload. `--fail` ends it with an error, and `--slow` makes it
never answer.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))

from vllm_stand_in import StandIn


def main(words: list[str]) -> None:
    """Serve until killed, and print each request that loads or unloads an adapter."""
    if "--fail" in words:
        sys.exit("ValueError: this GPU is too small")
    print("pid", os.getpid(), flush=True)
    if "--slow" in words:
        time.sleep(600)
    server = StandIn(words[words.index("--model") + 1], port=int(words[words.index("--port") + 1]))
    printed = 0
    while True:
        time.sleep(0.01)
        for path, body in server.asked[printed:]:
            if "lora" in path:
                print(path, body["lora_name"], flush=True)
        printed = len(server.asked)


if __name__ == "__main__":
    main(sys.argv)
