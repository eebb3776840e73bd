"""Lets the tests of the documentation import the two scripts that stand beside the guides."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
