from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from agentpref.models.tokenizer import end_tokens


@pytest.mark.parametrize(
    ("tokenizer", "configured", "ends"),
    [(2, None, {2}), (2, 7, {2, 7}), (2, [7, 8], {2, 7, 8}), (None, [7], {7}), (None, None, set())],
)
def test_end_tokens_are_those_of_the_tokenizer_and_of_the_generation_settings(
    tokenizer: int | None, configured: Any, ends: set[int]
) -> None:
    named: Any = SimpleNamespace(eos_token_id=tokenizer)
    assert end_tokens(named, configured) == ends
