"""How this very command is called again: by a loop, by a timer, from another folder."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path


def own_command() -> list[str]:
    """The first words of a command line that runs this agentpref, by absolute paths.

    The script of this environment, or else its Python: where the packages are found by PYTHONPATH
    alone, no script is installed.
    """
    script = Path(sysconfig.get_path("scripts")) / "agentpref"
    if os.access(script, os.X_OK):
        return [str(script)]
    return [os.path.abspath(sys.executable), "-m", "agentpref_cli"]
