"""The benchmark of rounding runs from end to end, and its arms are what they are named after."""

from __future__ import annotations

import json

import pytest

from benchmarks import rounding

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def test_a_toy_run_measures_all_arms_and_trains_in_both_precisions(
    random_base, monkeypatch, capsys
):
    monkeypatch.setattr(rounding, "ANSWER", 4)
    monkeypatch.setattr(rounding, "LONG_PROMPT", 2)
    options = ["--rows", "2", "--seeds", "0", "--pairs", "4", "--held-out", "4"]
    rounding.main(["--model", str(random_base), *options])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    errors = report["figures"]["errors"]
    assert list(errors) == ["one word", "90 tokens", "both", "long prompts"]
    for arms in errors.values():
        assert list(arms) == ["bfloat16", "autocast", "plain", "shared"]
        assert all(error["token"] > 0 for error in arms.values())
        assert arms["plain"]["token"] != arms["autocast"]["token"]
    assert report["figures"]["accuracies"]["0"].keys() == {"bfloat16", "float32"}
    assert [target["name"] for target in report["targets"]][-1].startswith("mean accuracy")
