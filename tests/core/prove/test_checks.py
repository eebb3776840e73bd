"""The user's own checks: what passes, what fails, and where installed ones are found."""

from __future__ import annotations

import sys

import pytest

from agentpref.errors import ConfigError
from agentpref.prove.checks import (
    installed_checks,
    installed_scorers,
    run_checks,
    run_scorers,
)
from agentpref.prove.evidence import UserCheckResult

HELLO = [{"role": "user", "content": "Hello?"}]


def echo(messages):
    return f"you said {messages[-1]['content']}"


def run_one(check):
    ((name, passed, message),) = [
        (c.name, c.passed, c.message) for c in run_checks({"c": check}, echo)
    ]
    assert name == "c"
    return passed, message


def test_no_checks_say_nothing():
    assert run_checks({}, echo) == ()


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        (True, (True, "passed")),
        (False, (False, "did not pass")),
        (None, (False, "did not pass")),
        ((True, "fine"), (True, "fine")),
        ((False, "rude"), (False, "rude")),
        ((False, ""), (False, "did not pass")),
    ],
)
def test_a_check_may_return_a_reason(outcome, found):
    assert run_one(lambda ask: outcome) == found


def test_a_check_asks_the_candidate():
    assert run_one(lambda ask: (ask(HELLO) == "you said Hello?", ask(HELLO)))[0]


def test_a_check_that_raises_has_failed_and_says_why():
    assert run_one(lambda ask: 1 / 0) == (False, "raised ZeroDivisionError: division by zero")


def test_an_interrupt_is_no_failure_of_the_check():
    def interrupted(ask):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_checks({"c": interrupted}, echo)


def test_checks_run_in_name_order_and_all_of_them():
    seen = []

    def noting(name, outcome):
        return lambda ask: seen.append(name) or outcome

    found = run_checks({"b": noting("b", False), "a": noting("a", True)}, echo)
    assert found == (
        UserCheckResult("a", True, "passed"),
        UserCheckResult("b", False, "did not pass"),
    )
    assert seen == ["a", "b"]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package that offers one check: its metadata, and perhaps its module."""

    def call(entry, source=None):
        info = tmp_path / "polite-1.0.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: polite\nVersion: 1.0\n")
        info.joinpath("entry_points.txt").write_text(f"[agentpref.checks]\n{entry}\n")
        if source is not None:
            tmp_path.joinpath("polite_checks.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    return call


@pytest.fixture(autouse=True)
def forget_the_module():
    yield
    sys.modules.pop("polite_checks", None)


def test_checks_of_installed_packages_are_found(install):
    install("polite = polite_checks:ok", "def ok(ask):\n    return False, 'no please'\n")
    assert run_checks(installed_checks(), echo) == (UserCheckResult("polite", False, "no please"),)


@pytest.mark.parametrize("source", [None, "def other(ask):\n    return True\n"])
def test_an_installed_check_that_cannot_be_loaded_is_named(install, source):
    install("polite = polite_checks:ok", source)
    with pytest.raises(ConfigError, match=r"'polite' .* 'polite_checks:ok'.* uninstall"):
        installed_checks()


# Scorers


def scores(scorer, live, candidate):
    prompts = [HELLO] * len(live)
    (found,) = run_scorers({"s": scorer}, prompts, live, candidate)
    return found


def test_a_scorer_compares_answers_to_the_same_prompts():
    live, candidate = [f"{n} long answer" for n in range(9)], [f"{n}" for n in range(9)]
    found = scores(lambda messages, answer: len(answer), live, candidate)
    assert (found.live, found.candidate, found.prompts, found.error) == (13.0, 1.0, 9, "")
    assert found.p == pytest.approx(1 / 512), "nine of nine are worse"
    assert scores(lambda messages, answer: -len(answer), live, candidate).p == pytest.approx(1.0)
    assert scores(lambda messages, answer: len(messages), live, candidate).p == 1.0
    assert run_scorers({}, [], [], []) == ()


def test_a_scorer_that_raises_or_gives_no_number_has_failed():
    assert scores(lambda m, a: 1 / 0, ["a"], ["b"]).error == (
        "raised ZeroDivisionError: division by zero"
    )
    assert "no finite number" in scores(lambda m, a: float("nan"), ["a"], ["b"]).error
    assert scores(lambda m, a: None, ["a"], ["b"]).error.startswith("raised TypeError")


def test_installed_scorers_are_found_by_name(monkeypatch):
    class Point:
        name, value = "brief", "some:brief"

        def load(self):
            return len

    monkeypatch.setattr("agentpref.plugins.entry_points", lambda group: [Point()])
    assert installed_scorers() == {"brief": len}
