"""Writes rows of any kind to a home, as tests of whole homes need them."""

from __future__ import annotations

from agentpref.record.store import Store
from agentpref.types import Comparison, Feedback, Run


def add(store: Store, *rows: Run | Feedback | Comparison) -> None:
    for row in rows:
        if isinstance(row, Run):
            store.add_run(row)
        elif isinstance(row, Feedback):
            store.add_feedback(row)
        else:
            store.add_comparison(row)
