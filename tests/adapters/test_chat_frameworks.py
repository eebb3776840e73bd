"""An integration whose framework is not installed says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest

from agentpref.errors import MissingDependency


@pytest.mark.parametrize("framework", ["gradio", "streamlit"])
def test_without_the_framework_the_error_has_the_command(
    framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, framework, None)
    monkeypatch.delitem(sys.modules, f"agentpref_adapters.{framework}", raising=False)
    with pytest.raises(MissingDependency, match=rf"pip install 'agentpref\[{framework}\]'"):
        importlib.import_module(f"agentpref_adapters.{framework}")
