"""The prompt arm: instructions that real homes' comparisons choose, and the real gate proves.

The model is random, so a text moves it one way or the other: which one is read off the first test.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace

import orjson
import pytest

import agentpref
from agentpref.config import UpdateConfig
from agentpref.errors import ConfigError, InvalidAdapter
from agentpref.evaluation import evaluate
from agentpref.home import Home
from agentpref.prefer.examples import is_held_out
from agentpref.prefer.judges import rubric
from agentpref.record.database import connect
from agentpref.record.updates import Updates
from agentpref.serve.backend import GenerationRequest
from agentpref.serve.decisions import taken_back_before
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_published
from agentpref_adapters.transformers import TransformersBackend
from tests.core.test_pipeline import CONFIG, learn, teach

NEAR, DEEP, RULE = "it is near", "it is deep", "Be brief."
PROMPT = replace(CONFIG, arm="prompt")


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A home with 60 pairs that like one of two answers better."""
    home = tmp_path_factory.mktemp("untaught") / "home"
    teach(home, range(100, 160), chosen=DEEP, rejected=NEAR)
    return home


@pytest.fixture(scope="module")
def instructed(tmp_path_factory, untaught, random_base):
    """A copy of it, in which instructions were proven and serve."""
    home = shutil.copytree(untaught, tmp_path_factory.mktemp("instructed") / "home")
    report = learn(home, random_base, replace(PROMPT, rules=(RULE,)))
    assert report.verdict == "promoted", report.reasons
    return home, report


@pytest.fixture
def home(instructed, tmp_path):
    return shutil.copytree(instructed[0], tmp_path / "home")


@pytest.fixture
def fresh(untaught, tmp_path):
    return shutil.copytree(untaught, tmp_path / "fresh")


@pytest.fixture
def opposed(tmp_path):
    """A home whose people like the other answer better."""
    home = tmp_path / "opposed"
    teach(home, range(100, 160), chosen=NEAR, rejected=DEEP)
    return home


def learned(home, revision):
    with closing(connect(Home.open(home), readonly=True)) as connection:
        return Updates(connection).learned_by(revision)


def weights(home, revision):
    return Registry(home).get(revision).manifest["files"]["adapter_model.safetensors"]


def test_a_rule_that_is_proven_serves_as_a_revision_without_training(instructed):
    home, report = instructed
    live = Registry(home).live()
    assert (live.revision_id, live.instructions) == (report.revision, RULE)
    assert report.accuracy["untagged"] == {"pairs": 23, "before": 0.5, "after": 1.0}
    assert report.training["start"] == "live, instructed"
    assert report.training["rules"] == (RULE,)
    assert all(not tensor.any() for name, tensor in check_published(live).tensors().items()
               if "lora_B" in name)  # fmt: skip
    assert len(learned(home, report.revision)) == 23, "an adapter may learn from the others"
    assert len(Home.open(home).answers(report.update_id)) == 10


def test_the_engine_gives_the_instructions_with_every_request(instructed, random_base):
    home, report = instructed
    messages = ({"role": "user", "content": "Is 7 a number?"},)
    asked = GenerationRequest(messages, max_tokens=12)
    said = GenerationRequest(({"role": "system", "content": RULE}, *messages), max_tokens=12)
    with closing(TransformersBackend(str(random_base))) as backend:
        backend.load(Registry(home).get(report.revision))
        answer = backend.generate(report.revision, asked)
        assert answer.token_ids == backend.generate("base", said).token_ids
        assert answer.token_ids != backend.generate("base", asked).token_ids
        backend.unload(report.revision)
        assert backend.generate("base", asked).prompt_tokens != answer.prompt_tokens


def test_an_adapter_that_is_trained_later_is_asked_and_served_with_them(home, random_base):
    teach(home, range(200, 280), chosen="a friend", rejected="an enemy", question="Who is {}?")
    report = learn(home, random_base)
    assert report.verdict == "promoted", report.reasons
    live = Registry(home).live()
    assert live.instructions == RULE
    assert live.manifest["training"]["start"] == "live"
    assert report.retained["untagged"]["before"] == 1.0, "live is asked with its instructions"
    assert weights(home, live.revision_id) != weights(home, live.parent)


def test_evaluation_asks_each_revision_with_its_own_instructions(home, random_base):
    teach(home, range(300, 320), chosen=DEEP, rejected=NEAR)
    found = evaluate(home, ["live", "base"], model=str(random_base))
    [group] = [one for one in found.groups if one.name == "all"]
    assert group.accuracy[Registry(home).live().revision_id].accuracy == 1.0
    scored = {one.revision: one.kl for one in found.revisions}
    assert scored["base"] == 0.0 < scored[Registry(home).live().revision_id]


def test_a_rule_that_is_refused_leaves_its_examples_new(opposed, random_base):
    report = learn(opposed, random_base, replace(PROMPT, rules=(RULE,)))
    assert (report.verdict, Registry(opposed).list()) == ("refused", [])
    report = learn(opposed, random_base)
    assert report.verdict == "promoted", report.reasons
    assert report.counts["trained"] == 37


def test_the_same_rule_is_not_tried_twice_and_another_one_is(opposed, random_base):
    bad = replace(PROMPT, rules=(RULE,))
    first = learn(opposed, random_base, bad)
    again = learn(opposed, random_base, bad)
    assert again.verdict == "nothing_new"
    assert first.update_id in " ".join(again.notes)
    other = learn(opposed, random_base, replace(PROMPT, rules=("Use a bulleted list.",)))
    assert other.verdict == "insufficient", "it is another rule, and neither good nor bad"


def test_without_a_rule_that_helps_nothing_is_published(fresh, random_base):
    report = learn(fresh, random_base, PROMPT)
    assert (report.verdict, Registry(fresh).list()) == ("refused", [])
    assert "the comparisons show nothing that a rule could say" in report.reasons[0]
    assert report.counts["trained"] == 0 < report.counts["new"]


def test_a_principle_of_a_judge_is_tried_as_a_rule_and_a_broken_rubric_is_passed_over(
    fresh, random_base
):
    place = Home.open(fresh)
    text = "---\nmodel: m\nprinciples:\n  - Use a bulleted list.\n  - {}\n---\n"
    rubric.write(place, "mine", text.format(RULE))
    (place.judges / "broken.md").write_text("no front matter")
    report = learn(fresh, random_base, PROMPT)
    told = report.training["instructions"]
    assert report.training["tried"] >= 2
    assert report.verdict in ("promoted", "refused")
    assert told.startswith("Write the answer that somebody would choose who was told: ")


def test_both_trains_the_same_adapter_and_says_what_text_alone_does(fresh, tmp_path, random_base):
    other = shutil.copytree(fresh, tmp_path / "other")
    plain = learn(fresh, random_base)
    both = learn(other, random_base, replace(CONFIG, arm="both", rules=(RULE,)))
    assert (plain.verdict, both.verdict) == ("promoted", "promoted")
    assert weights(fresh, plain.revision) == weights(other, both.revision)
    assert Registry(other).live().instructions == ""
    text = both.training["text"]
    assert (text["rules"], text["verdict"], text["text"]) == ((RULE,), "passed", 1.0)
    note = "text alone does as well: 1.00 right beside the adapter's 1.00 on 23 held-out prompts"
    assert any(one.startswith(note) and "--arm prompt" in one for one in both.notes)


def test_both_says_where_text_does_not_do_as_well(opposed, random_base):
    report = learn(opposed, random_base, replace(CONFIG, arm="both", rules=(RULE,)))
    [note] = [one for one in report.notes if one.startswith("text alone")]
    assert note.startswith("text alone does not do as well: ")
    assert "the gate: " in note


def test_rules_need_an_arm_that_reads_them():
    with pytest.raises(ConfigError, match=r"rules is .*has no effect, since arm is 'adapter'"):
        UpdateConfig(rules=("Be brief.",))
    with pytest.raises(ConfigError, match="arm is 'text', but must be adapter, both or prompt"):
        UpdateConfig(arm="text")


def test_instructions_that_somebody_edited_are_not_served(home):
    live = Registry(home).live()
    edited = replace(live, manifest={**live.manifest, "instructions": "Buy tea."})
    with pytest.raises(InvalidAdapter, match="is not the name of the digests"):
        check_published(edited)
    file = live.path / "manifest.json"
    file.chmod(0o644)
    file.write_bytes(orjson.dumps({**live.manifest, "instructions": "Buy tea."}))
    with pytest.raises(InvalidAdapter, match=r"manifest\.json is not the file that was published"):
        check_published(live)


def test_taking_instructions_back_takes_no_weights_back(home):
    told = Registry(home).live()
    Registry(home).rollback()
    with closing(connect(Home.open(home), readonly=True)) as connection:
        other = replace(told, revision_id="rev-000099-0123456789ab", manifest={
            **told.manifest, "instructions": "Another."})  # fmt: skip
        assert taken_back_before(connection, other, ()) is None
        same = replace(told, revision_id="rev-000099-0123456789ab")
        assert "was rolled back" in (taken_back_before(connection, same, ()) or "")


def test_forgetting_who_compared_taints_rules_that_were_chosen_and_no_weights_below(
    tmp_path, random_base
):
    home = tmp_path / "home"
    teach(home, range(80), chosen="a friend", rejected="an enemy", question="Who is {}?")
    below = learn(home, random_base).revision
    compare_as_ana(home)
    principles = "\n".join(f"  - {text}" for text in (RULE, "Say yes.", "Q", "xyz", "Stay calm."))
    text = f"---\nmodel: m\nprinciples:\n{principles}\n---\n"
    rubric.write(Home.open(home), "mine", text)
    report = learn(home, random_base, PROMPT)
    assert report.verdict == "promoted", report.reasons
    assert "somebody would choose who was told: Stay calm." in report.training["instructions"]
    assert Registry(home).get(report.revision).parent == below
    assert weights(home, report.revision) == weights(home, below)
    with agentpref.Log(home) as log:
        log.forget(user_id="ana")
    assert Registry(home).get(report.revision).tainted_at is not None
    assert Registry(home).get(below).tainted_at is None


def test_rules_of_your_own_learn_nothing_from_who_is_forgotten(tmp_path, random_base):
    home = tmp_path / "home"
    compare_as_ana(home)
    report = learn(home, random_base, replace(PROMPT, rules=(RULE,)))
    assert report.verdict == "promoted", report.reasons
    with agentpref.Log(home) as log:
        log.forget(user_id="ana")
    assert Registry(home).get(report.revision).tainted_at is None


def compare_as_ana(home):
    with agentpref.Log(home) as log:
        for number in range(100, 160):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            a, b = log.record(asked, DEEP), log.record(asked, NEAR)
            log.compare(a, b, winner="a", user_id="ana")


def test_rules_that_live_is_told_already_bring_nothing(home, random_base):
    teach(home, range(200, 240), chosen=DEEP, rejected=NEAR)
    report = learn(home, random_base, replace(PROMPT, rules=(RULE,)))
    assert report.verdict == "nothing_to_gain"
    assert "what serves is told these rules already" in report.notes
    assert Registry(home).state().live == Registry(home).list()[-1].revision_id
    assert learn(home, random_base).counts["new"] > 0, "an adapter may still learn from them"


def test_comparisons_of_which_none_is_held_out_are_no_proof_and_that_is_said(tmp_path, random_base):
    home = tmp_path / "home"
    trained = [n for n in range(40) if not is_held_out(
        [{"role": "user", "content": f"Is {n} a number?"}], PROMPT.held_out)]  # fmt: skip
    teach(home, trained, chosen=DEEP, rejected=NEAR)
    report = learn(home, random_base, PROMPT)
    assert report.verdict == "nothing_usable"
    assert f"none of {len(trained)} examples is held out" in report.notes[-1]


def test_a_rule_that_says_nothing_or_too_much_is_refused():
    for wrong in ("  ", "a" * 2001):
        with pytest.raises(ConfigError, match=r"2,000 characters at most") as caught:
            UpdateConfig(arm="prompt", rules=(wrong,))
        assert len(str(caught.value)) < 400
