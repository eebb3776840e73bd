"""The settings of one update, each declared once: type, bounds, default and description.

    >>> UpdateConfig(seed=1, loss=LossSettings(beta=0.2)).loss.beta
    0.2
    >>> UpdateConfig(batch_size=2.5)
    Traceback (most recent call last):
    agentpref.errors.ConfigError: batch_size is 2.5, but must be a whole number of 1 or more

Every value is checked (``agentpref.settings``), in Python as well as from TOML and ``--set``. `make
docs` writes the table of settings in docs/updates.md from these declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias

import orjson
from pydantic import AfterValidator, Field, JsonValue
from pydantic.dataclasses import dataclass

from agentpref import plugins
from agentpref.errors import ConfigError
from agentpref.settings import LARGEST, STRICT, OneOf, fields_of, group, refuse_idle, setting
from agentpref.types import HELD_OUT, LORA_RANKS, THUMBS

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "4bit"]
"""The number format in which a base model is held."""


def loss_kinds() -> tuple[str, ...]:
    """The registered losses: what ``loss.kind`` and ``thumbs.kind`` may be."""
    return plugins.names(plugins.LOSSES)


def _as_set(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def _loss(name: str, kind: str, *, lone: bool) -> Any:
    """Load the loss that the setting ``name`` asks for; refuse one for the other examples."""
    loss = plugins.load(plugins.LOSSES, kind)
    if getattr(loss, "lone", lone) != lone:
        of, other = ("pairs", "loss.kind") if lone else ("lone thumbs", "thumbs.kind")
        raise ConfigError(f"{name} is {kind!r}, a loss of {of}; set {other} to it instead")
    return loss


@group("lora.")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter."""

    rank: Annotated[int, OneOf(lambda: LORA_RANKS)] = setting(16, "rank; vLLM loads no others")
    alpha: int = setting(32, "scale: what the adapter adds is multiplied by α/rank", gt=0)


@group("loss.")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class LossSettings:
    """The loss of a pair, and the anchor on the chosen answer."""

    kind: Annotated[str, OneOf(loss_kinds)] = setting(
        "sigmoid", "a registered loss of pairs (not kto): see training.md"
    )
    beta: float = setting(0.1, "temperature β of the loss", gt=0)
    noise: float | None = setting(
        None,
        "share ε of flipped labels, for sigmoid and robust; None: each pair's own",
        ge=0,
        le=0.5,
    )
    wpo: bool = setting(
        False, "weigh what the live revision did not write by its probability there (2406.11827)"
    )
    nll: float = setting(0.1, "weight α of the NLL anchor (2404.19733)", ge=0)
    nll_on_corrections: float = setting(
        1.0, "weight α of the anchor on corrections, and on likes", ge=0
    )

    def __post_init__(self) -> None:
        settings = fields_of(type(self))
        changed = [name for name in settings if getattr(self, name) != settings[name].default]
        if not changed:
            return
        reads = getattr(_loss("loss.kind", self.kind, lone=False), "reads", frozenset[str]())
        for name in (name for name in changed if name != "kind" and name not in reads):
            because = f"loss.kind {self.kind!r} does not read it"
            refuse_idle(self, f"loss.{name}", because, "leave it out, or set another loss.kind")
        if self.kind == "robust" and self.noise == 0.5:
            raise ConfigError(
                "loss.noise is 0.5, at which loss.kind 'robust' divides by zero: such labels are "
                "random; lower it, or set loss.kind to 'sigmoid'"
            )
        if self.kind == "robust" and self.noise == 0:
            cure = "leave it at 'sigmoid', or leave loss.noise out"
            refuse_idle(self, "loss.kind", "with loss.noise 0 it is plain DPO", cure)


@group("thumbs.", switch="weight")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class ThumbSettings:
    """The loss of a lone thumb: KTO (2402.01306), in the same batches as the pairs.

    λ that are not given are balanced to the n_D likes and n_U dislikes of the update, so that
    λ_D·n_D = λ_U·n_U: the lower end of the paper's range [1, 4/3]. If neither is given, the mean
    of λ over the thumbs is 1.
    """

    kind: Annotated[str, OneOf(loss_kinds)] = setting("kto", "a registered loss of lone thumbs")
    weight: float = setting(1.0, "weight of a thumb beside a pair's 1; 0 turns thumbs off", ge=0)
    desirable: float | None = setting(None, "λ_D, the weight of likes; None: balanced", gt=0)
    undesirable: float | None = setting(None, "λ_U, the weight of dislikes; None: balanced", gt=0)

    def __post_init__(self) -> None:
        if self.kind != fields_of(type(self))["kind"].default:
            _loss("thumbs.kind", self.kind, lone=True)


@group("kl.", switch="weight")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class KLSettings:
    """The penalty λ·max(0, KL − target), which keeps a candidate near the live revision.

    The target falls as ``gate.kl_budget`` is spent: an update may spend ``share`` of what live has
    left. Beyond the share ``pull`` of the budget, the same penalty holds against the base.
    """

    weight: float = setting(3.0, "weight λ; 0 turns the penalty off", ge=0)
    target: float = setting(0.05, "KL without penalty, in nats per token", gt=0)
    share: float = setting(0.5, "share of the budget left that one update may spend", gt=0, le=1)
    pull: float = setting(0.6, "share of the budget beyond which the base pulls", gt=0, le=1)


@group("anchor.", switch="size")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class AnchorSettings:
    """Ordinary logged answers, outside of what people judge, that a candidate goes on to give."""

    size: int = setting(256, "how many to draw from the log; 0 turns the anchor off", ge=0)
    weight: float = setting(0.02, "weight α of their NLL, beside a pair's 1", ge=0)
    kl: float = setting(0.5, "weight κ of their KL to live; none without kl.weight", ge=0)


@group("comments.", switch="weight")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class CommentSettings:
    """Self-distillation by people's comments: live, told one, teaches the candidate (2601.19897).

    The loss is KL(live told the comment ‖ candidate), in nats per token of the answer that was
    commented on.
    """

    weight: float = setting(0.0, "weight of a remark, beside a pair's 1; 0 turns them off", ge=0)
    size: int = setting(64, "how many comments to learn from, the newest first", ge=1)


@group("offline.")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class OfflineSettings:
    """What logged conversations earned, and what an offline ``method`` makes of it."""

    rewards: dict[str, float] = setting(
        {THUMBS: 1.0}, "keys of feedback whose scores are rewards, with their weights", min_length=1
    )
    cost: float = setting(0.0, "what each answer costs")
    tool_error: float = setting(0.0, "what an answer costs whose tool failed")
    gamma: float = setting(0.99, "discount of each later answer", gt=0, le=1)
    conversations: int = setting(2000, "read at most so many conversations, the newest", ge=1)
    share: float = setting(0.2, "share of the best conversations to imitate", gt=0, le=1)
    temperature: float = setting(
        0.05, "how sharply better answers weigh more, in standard deviations of the returns", gt=0
    )
    expectile: float = setting(
        0.8, "how far the value of a state leans to its best answers", ge=0.5, lt=1
    )
    draws: int = setting(4, "answers to draw from live at each state", ge=1, le=64)
    support: float = setting(
        0.3, "least probability of a token, relative to live's likeliest answer", gt=0, le=1
    )
    conservatism: float = setting(
        1.0, "weight α of what pushes down the values of what the log does not show", ge=0
    )
    penalty: float = setting(
        2.0,
        "how much less an answer is worth of which the log says nothing, in standard deviations of "
        "the returns",
        ge=0,
    )


OF_REWARDS = frozenset({"rewards", "cost", "tool_error", "gamma", "conversations"})
"""The settings of the group ``offline`` that every method reads."""

PREFERENCES = "preferences"
"""The method of an update that learns from judgements, and reads no conversation."""


def methods() -> tuple[str, ...]:
    """What ``method`` may be: preferences, or a registered method of offline learning."""
    return (PREFERENCES, *plugins.names(plugins.METHODS))


@group("replay.", switch="minimum")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """How many old examples are trained again beside the new ones."""

    minimum: int = setting(128, "replay at least so many examples; 0 turns replay off", ge=0)
    hard_share: float = setting(0.3, "share of hard examples; the rest are random", ge=0, le=1)
    refit: int = setting(
        4000, "replay at most so many when the KL budget is spent and base is refitted", ge=1
    )


@group("gate.")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class GateSettings:
    """What a candidate must prove before it serves."""

    confidence: float = setting(0.95, "confidence of one-sided intervals", gt=0.5, lt=1)
    cross_fit_below: int = setting(
        100,
        "with fewer new held-out prompts, trained ones are evidence too, each judged by a model "
        "that had not seen it; 0: never",
        ge=0,
    )
    folds: int = setting(
        3, "parts of the trained prompts for that; a model is trained for each but the first", ge=2
    )
    canary: float = setting(
        0.1,
        "share of the threads that a candidate serves as the canary, where its gain is likely (at "
        "most 1 in 10 by chance, at later looks less) and not proven; 0: none",
        ge=0,
        le=0.5,
    )
    retention_margin: float = setting(0.03, "loss of accuracy that is allowed", ge=0)
    flip_rate: float = setting(
        0.1,
        "share of a stratum's pairs that a harmless update may turn over, both ways together, "
        "or twice the share that became better if that is more; widens the retention margin to "
        "what that shows by chance",
        ge=0,
        le=1,
    )
    min_stratum: int = setting(50, "smaller strata are pooled with their siblings", ge=1)
    max_old_pairs: int = setting(1000, "evaluate at most so many old held-out pairs", ge=1)
    kl_budget: Annotated[float, Field(gt=0)] | Literal["auto"] = setting(
        0.15,
        "KL from the base model, in nats per token; auto: 0.15, or less where `agentpref reward "
        "frontier` saw answers become worse on the way",
    )
    ordinary_loss: float = setting(
        0.03, "loss of likelihood of ordinary answers, in nats per token", gt=0
    )
    temperature: float = setting(
        0.7, "temperature of the answers that are drawn beside the greedy ones", gt=0
    )
    distinct_floor: float = setting(0.9, "distinct-2 of the answers, relative to live", ge=0)
    length_ratio: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]] = (
        setting((0.8, 1.25), "length of the answers, relative to live", strict=False)
    )

    def __post_init__(self) -> None:
        if not self.cross_fit_below:
            cure = "leave it out, or raise gate.cross_fit_below"
            refuse_idle(self, "gate.folds", "gate.cross_fit_below is 0", cure)

    @property
    def budget(self) -> float:
        """``kl_budget`` as a number, once :mod:`agentpref.prove.kl_budget` has settled it."""
        if self.kl_budget == "auto":
            raise ConfigError("gate.kl_budget is 'auto', which only an update of a home settles")
        return self.kl_budget


@group("watch.")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """What is done when people's thumbs prove something of a revision that serves.

    They are no settings of an update: a home keeps them for each namespace, and every process goes
    by them. See :meth:`agentpref.Registry.check_thumbs`.
    """

    canary: Literal["act", "report"] = setting(
        "act",
        "end a canary that is proven worse, promote one that is better; or only say so",
    )
    live: Literal["act", "report"] = setting(
        "report", "roll back a live revision that is proven worse; or only say so"
    )
    alpha: float = setting(0.05, "chance of a false alarm, however often one looks", gt=0, lt=0.5)
    margin: float = setting(0.0, "how much lower a share of likes may be", ge=0, le=0.5)


@group("")
@dataclass(config=STRICT, frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """All settings of one update.

    Instances are immutable and comparable; ``dataclasses.replace(config, seed=1)`` makes a changed,
    checked copy.
    """

    seed: int = setting(0, "seed of everything random", ge=0, le=LARGEST)
    held_out: float = setting(HELD_OUT, "share of prompts that prove and never train", gt=0, lt=1)
    held_out_tags: Annotated[
        tuple[Annotated[str, Field(pattern=r"\S", max_length=200)], ...], AfterValidator(_as_set)
    ] = setting(
        (),
        "tags that never train and prove nothing: the report tells how a candidate fares there",
        strict=False,
    )
    batch_size: int = setting(16, "examples in a step", ge=1)
    learning_rate: float | None = setting(None, "peak rate; None: from the model's size", gt=0)
    epochs: int | None = setting(None, "passes over the data; None: by the number of pairs", ge=1)
    max_length: int = setting(
        1024, "tokens of a prompt with an answer, at most; fewer if the model takes fewer", ge=16
    )
    precision: Precision = setting("auto", "number format of the base model")
    chat_template_kwargs: dict[str, JsonValue] = setting(
        {}, "arguments of the chat template, such as enable_thinking=false; as in serving"
    )
    max_minutes: float | None = setting(None, "time for the whole update; None: no limit", gt=0)
    arm: Literal["adapter", "both", "prompt"] = setting(
        "adapter",
        "what is learned: an adapter; instructions (prompt: nothing is trained, and settings of "
        "training do nothing); or an adapter, and the report says whether instructions do as well "
        "(both)",
    )
    method: Annotated[str, OneOf(methods)] = setting(
        PREFERENCES,
        "what is learned from: judgements (preferences), or what whole conversations earned, by a "
        "registered method: see offline-rl.md",
    )
    rules: tuple[Annotated[str, Field(pattern=r"\S", max_length=2000)], ...] = setting(
        (), "instructions of your own to prove; none: those that the comparisons show", strict=False
    )
    lora: LoraSettings = LoraSettings()
    loss: LossSettings = LossSettings()
    thumbs: ThumbSettings = ThumbSettings()
    kl: KLSettings = KLSettings()
    anchor: AnchorSettings = AnchorSettings()
    comments: CommentSettings = CommentSettings()
    offline: OfflineSettings = OfflineSettings()
    replay: ReplaySettings = ReplaySettings()
    gate: GateSettings = GateSettings()

    def __post_init__(self) -> None:
        if not self.kl.weight and self.anchor.size:
            refuse_idle(
                self.anchor, "anchor.kl", "kl.weight is 0", "leave it out, or raise kl.weight"
            )
        if self.arm == "adapter":
            refuse_idle(self, "rules", "arm is 'adapter'", "leave it out, or set arm to 'prompt'")
        self._refuse_what_the_method_does_not_read()

    def _refuse_what_the_method_does_not_read(self) -> None:
        reads, because = frozenset[str](), f"method is {self.method!r}"
        if self.method != PREFERENCES:
            method = plugins.load(plugins.METHODS, self.method)
            reads = OF_REWARDS | getattr(method, "reads", frozenset[str]())
            refuse_idle(self, "arm", because, "leave it out: a method trains an adapter")
            refuse_idle(self, "held_out_tags", because, "leave it out: conversations have no tags")
        for name in fields_of(OfflineSettings):
            if name not in reads:
                cure = "leave it out, or set another method"
                refuse_idle(self.offline, f"offline.{name}", because, cure)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> UpdateConfig:
        """Build a config from nested mappings, as read from TOML or ``--set loss.beta=0.2``.

        Raises:
            ConfigError: for a key that does not exist (the nearest one is suggested) or a value
                of the wrong type or out of range.
        """
        if not isinstance(settings, Mapping) or not all(isinstance(k, str) for k in settings):
            raise ConfigError(
                f"settings are {settings!r}, but must be a mapping of names to values"
            )
        groups = {name: field.annotation for name, field in fields_of(cls).items()}
        return cls(
            **{
                name: groups[name](**value)
                if isinstance(value, Mapping) and is_dataclass(groups.get(name))
                else value
                for name, value in settings.items()
            }
        )

    def to_mapping(self) -> dict[str, Any]:
        """The config as nested JSON values: what reports and manifests store."""
        values: dict[str, Any] = orjson.loads(orjson.dumps(asdict(self)))
        return values
