"""Online RL by TRL on the bundled model: a few real steps, with rules as rewards."""

from __future__ import annotations

import hashlib
import json
import random
import sys

import pytest

pytest.importorskip("trl")

import torch
from safetensors.torch import load_file

import agentpref
from agentpref.config import LoraSettings
from agentpref.errors import ConfigError, InvalidAdapter, MissingDependency, TrainingDiverged
from agentpref.home import Home
from agentpref.serve.validate import check_adapter
from agentpref_adapters.trl import Trained, train_online

PROMPTS = [[{"role": "user", "content": f"Is {number} a number?"}] for number in range(6)]
WEIGHTS = "adapter_model.safetensors"


def shorter(messages, answers):
    return [-float(len(answer)) for answer in answers]


def train(folder, **options) -> Trained:
    few = {"steps": 2, "prompts_per_step": 2, "answers": 3, "max_tokens": 12}
    given = {"model": "tiny", "prompts": PROMPTS, "reward": shorter, **few, **options}
    return train_online(folder, **given)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Trained:
    return train(tmp_path_factory.mktemp("first") / "out", steps=3)


def bits(folder) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_few_steps_write_a_clean_adapter(tmp_path, method, capfd) -> None:
    stages, seen = [], []
    done = train(
        tmp_path / "out",
        method=method,
        progress=lambda *now: stages.append(now),
        observe=seen.append,
    )
    assert sorted(file.name for file in done.folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    check_adapter(done.folder)
    assert any(tensor.abs().max() > 0 for name, tensor in load_file(done.folder / WEIGHTS).items()
               if "lora_B" in name)  # fmt: skip
    assert list(done.steps) == seen
    assert [step.number for step in done.steps] == [1, 2]
    assert done.steps[0].kl == pytest.approx(0.0, abs=1e-6), "it is measured from the start"
    assert all(step.reward < 0 and step.spread > 0 for step in done.steps)
    assert all(0 < step.tokens <= 12 and 0 <= step.cut <= 1 for step in done.steps)
    assert stages == [
        ("load model", 0, 1), ("load model", 1, 1),
        ("train online", 0, 2), ("train online", 1, 2), ("train online", 2, 2),
    ]  # fmt: skip
    assert capfd.readouterr().out == "", "a library prints nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_reward_gets_the_messages_and_the_answers_of_one_prompt(tmp_path) -> None:
    asked = [[{"role": "system", "content": "Be brief."}, *PROMPTS[0]], *PROMPTS[1:]]
    calls = []

    def reward(messages, answers):
        calls.append((messages, answers))
        return shorter(messages, answers)

    train(tmp_path / "out", prompts=asked, reward=reward)
    assert len(calls) == 4
    assert all(messages in asked and len(answers) == 3 for messages, answers in calls)
    assert not any("<|im_end|>" in answer for _, answers in calls for answer in answers)


def test_training_towards_a_reward_raises_it(tmp_path) -> None:
    """The rule likes answers of few letters; ten steps are enough to see it."""
    done = train(
        tmp_path / "out", steps=10, prompts_per_step=6, answers=6, beta=0.0, learning_rate=1e-2
    )
    rewards = [step.reward for step in done.steps]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 5
    assert all(step.kl is None for step in done.steps), "nothing is measured without a penalty"


def test_it_starts_from_an_adapter_which_is_its_reference_and_stays_as_it_is(
    tmp_path, first
) -> None:
    before = bits(first.folder)
    done = train(tmp_path / "out", start=first.folder)
    assert done.steps[0].kl == pytest.approx(0.0, abs=1e-6)
    assert bits(first.folder) == before != bits(done.folder)
    same = load_file(first.folder / WEIGHTS)
    moved = load_file(done.folder / WEIGHTS)
    assert same.keys() == moved.keys(), "no reference is saved beside it"
    assert max((moved[name] - same[name]).abs().max() for name in same) < 0.1


def test_the_shape_of_a_fresh_adapter_is_chosen(tmp_path) -> None:
    done = train(tmp_path / "out", steps=1, lora=LoraSettings(rank=8, alpha=16))
    config = json.loads((done.folder / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"]) == (8, 16)


def test_the_same_seed_gives_the_same_adapter_and_the_hosts_random_numbers_stay(tmp_path) -> None:
    random.seed(5)
    torch.manual_seed(5)
    state, tensor_state = random.getstate(), torch.random.get_rng_state()
    folders = [train(tmp_path / name, seed=seed).folder for name, seed in (("a", 1), ("b", 1))]
    assert random.getstate() == state
    assert torch.equal(torch.random.get_rng_state(), tensor_state)
    other = train(tmp_path / "c", seed=2).folder
    assert bits(folders[0]) == bits(folders[1]) != bits(other)


def test_fewer_prompts_than_a_step_has_and_some_that_are_too_long(tmp_path) -> None:
    long = [{"role": "user", "content": "a number " * 4000}]
    done = train(tmp_path / "out", prompts=[PROMPTS[0], long], prompts_per_step=8)
    assert done.too_long == 1
    assert len(done.steps) == 2
    with pytest.raises(ConfigError, match="none of 1 prompts has room for an answer of 12 tokens"):
        train(tmp_path / "none", prompts=[long])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"answers": 1}, "answers is 1, but must be finite, and 2 or more"),
        ({"steps": 0}, "steps is 0"),
        ({"beta": -0.1}, r"beta is -0\.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"method": "ppo"}, "method is 'ppo', but must be one of grpo, rloo"),
        ({"start": "anywhere", "lora": LoraSettings()}, "lora is without effect beside start"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_work(tmp_path, options, named) -> None:
    with pytest.raises(ConfigError, match=named):
        train(tmp_path / "out", progress=lambda *_: pytest.fail("it worked"), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_free_is_refused(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="choose a folder that is missing or empty"):
        train(tmp_path / "out")
    Home.create(tmp_path / "home")
    with pytest.raises(ConfigError, match="is inside the home"):
        train(tmp_path / "home" / "out")


def test_a_start_that_is_broken_or_of_another_base_is_refused(tmp_path, first, random_base) -> None:
    with pytest.raises(InvalidAdapter, match="is not a folder"):
        train(tmp_path / "out", start=tmp_path / "missing")
    with pytest.raises(InvalidAdapter, match=r"adapts a layer of|is not a linear layer"):
        train(tmp_path / "out", start=first.folder, model=str(random_base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [[1.0], [1.0, 2.0, float("nan")], [0.0] * 4])
def test_a_reward_that_is_no_number_for_each_answer_is_refused(tmp_path, given) -> None:
    with pytest.raises(ConfigError, match=r"the reward gave \d numbers for 3 answers"):
        train(tmp_path / "out", reward=lambda messages, answers: given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_in_the_middle_leaves_nothing(tmp_path, error) -> None:
    calls = []

    def reward(messages, answers):
        calls.append(messages)
        if len(calls) > 2:
            raise error
        return shorter(messages, answers)

    with pytest.raises(error):
        train(tmp_path / "out", reward=reward)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_diverged_are_not_written(tmp_path, monkeypatch) -> None:
    def check(folder):
        raise InvalidAdapter(f"{folder}: a number is not finite")

    monkeypatch.setattr("agentpref_adapters.trl.check_adapter", check)
    with pytest.raises(TrainingDiverged, match="lower learning_rate, or raise beta"):
        train(tmp_path / "out", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_the_gate_takes_what_it_trained(tmp_path, first) -> None:
    with agentpref.Log(tmp_path / "home") as log:
        for number in range(30):
            asked = [{"role": "user", "content": f"Is {number} a number?"}]
            runs = [log.record(asked, text) for text in ("Yes.", "No, that is none, I believe.")]
            log.compare(*runs, winner="a")
        trained_on = runs[:1]
    report = agentpref.adopt(
        tmp_path / "home", first.folder, model="tiny", checks={}, trained_on=trained_on
    )
    assert report.verdict in ("promoted", "refused", "insufficient")
    assert report.training["adopted"]["sha256"] == bits(first.folder)
    assert report.counts["new_evaluated"] > 0


def test_without_trl_the_error_names_the_command(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "agentpref_adapters.trl")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingDependency, match=r"pip install 'agentpref\[rl\]'"):
        import agentpref_adapters.trl  # noqa: F401
