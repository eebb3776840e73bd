"""The settings of one update, as small values with defaults that are meant to be kept.

Each group belongs to the part that reads it: ``lora``, ``loss`` and ``thumbs`` to the trainer,
``kl`` and ``replay`` to what guards against forgetting, ``gate`` to the verdict. Keys that a user
writes and that do not exist are refused, with the nearest name suggested; so is a setting that
another one leaves without effect. Nothing here reads a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from agentpref.errors import ConfigError

T = TypeVar("T")

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "4bit"]
"""What a base model may be held in while it is trained on."""

LossKind: TypeAlias = Literal["sigmoid", "robust", "ipo", "ipo_sum", "hinge", "apo_zero"]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Shape of the adapter. vLLM loads ranks 8, 16, 32, 64, 128, 256 and 512 only."""

    rank: int = 16
    alpha: int = 32

    def __post_init__(self) -> None:
        _require(
            self.rank in {8, 16, 32, 64, 128, 256, 512},
            "lora.rank",
            self.rank,
            "8, 16, 32, 64, 128, 256 or 512, the ranks that vLLM loads",
        )
        _require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What a pair costs: a loss of its margin with β, and the NLL anchor (2404.19733) on top.

    ``sigmoid`` is DPO (2305.18290) with the conservative noise term, ``robust`` its unbiased sister
    (2403.00409), ``ipo`` IPO (2310.12036) on means over tokens and ``ipo_sum`` on sums, ``hinge``
    SLiC's (2305.10425) and ``apo_zero`` APO-zero (2408.06266). ``noise`` is the share ε of flipped
    labels, for all pairs instead of each one's own. ``wpo`` weighs answers that the live policy did
    not write by how likely they are to it (2406.11827).
    """

    kind: LossKind = "sigmoid"
    beta: float = 0.1
    noise: float | None = None
    wpo: bool = False
    nll: float = 0.1
    nll_on_corrections: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self.kind in ("sigmoid", "robust", "ipo", "ipo_sum", "hinge", "apo_zero"),
            "loss.kind",
            self.kind,
            "sigmoid, robust, ipo, ipo_sum, hinge or apo_zero",
        )
        _require(self.beta > 0, "loss.beta", self.beta, "above 0")
        _require(
            self.noise is None or 0 <= self.noise <= 0.5,
            "loss.noise",
            self.noise,
            "from 0 to .5, below .5 for robust; sigmoid and robust only",
        )
        _require(isinstance(self.wpo, bool), "loss.wpo", self.wpo, "true or false")
        _require(self.nll >= 0, "loss.nll", self.nll, "0 or more")
        _require(
            self.nll_on_corrections >= 0,
            "loss.nll_on_corrections",
            self.nll_on_corrections,
            "0 or more",
        )
        self._check_noise()

    def _check_noise(self) -> None:
        if self.kind not in ("sigmoid", "robust"):
            _refuse_idle(
                self,
                "loss.noise",
                f"loss.kind {self.kind!r} has no noise term",
                "leave it out, or set loss.kind to 'sigmoid' or 'robust'",
            )
        if self.kind == "robust" and self.noise == 0.5:
            raise ConfigError(
                "loss.noise is 0.5, at which loss.kind 'robust' divides by zero: a coin's labels "
                "say nothing; lower it, or set loss.kind to 'sigmoid'"
            )
        if self.kind == "robust" and self.noise == 0:
            _refuse_idle(
                self,
                "loss.kind",
                "with loss.noise 0 it is plain DPO",
                "leave it at 'sigmoid', or leave loss.noise out",
            )


@dataclass(frozen=True, slots=True)
class ThumbSettings:
    """What lone thumbs cost: KTO (2402.01306), in the same batches as the pairs.

    At ``weight`` 1 a thumb counts on average as much as a pair. ``desirable`` and ``undesirable``
    are λ_D and λ_U; those that are not given are balanced to the night's n_D likes and n_U
    dislikes, so that λ_D·n_D = λ_U·n_U: the lower end of the paper's [1, 4/3], where neither side
    outweighs the other. If neither is given, the mean of λ over the thumbs is 1.
    """

    weight: float = 1.0
    desirable: float | None = None
    undesirable: float | None = None

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "thumbs.weight", self.weight, "0 or more (0 turns them off)")
        _require(
            self.desirable is None or self.desirable > 0,
            "thumbs.desirable",
            self.desirable,
            "above 0",
        )
        _require(
            self.undesirable is None or self.undesirable > 0,
            "thumbs.undesirable",
            self.undesirable,
            "above 0",
        )
        if self.weight == 0:
            for name in ("thumbs.desirable", "thumbs.undesirable"):
                _refuse_idle(
                    self, name, "thumbs.weight is 0", "leave it out, or raise thumbs.weight"
                )


@dataclass(frozen=True, slots=True)
class KLSettings:
    """λ·max(0, KL − target): holds a candidate near the live policy; target in nats per token."""

    weight: float = 3.0
    target: float = 0.05

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "kl.weight", self.weight, "0 or more (0 turns it off)")
        _require(self.target > 0, "kl.target", self.target, "above 0")
        if self.weight == 0:
            _refuse_idle(self, "kl.target", "kl.weight is 0", "leave it out, or raise kl.weight")


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How many old pairs are trained again beside the new ones."""

    minimum: int = 128
    hard_share: float = 0.3

    def __post_init__(self) -> None:
        _require(self.minimum >= 0, "replay.minimum", self.minimum, "0 or more (0 turns it off)")
        _require(0 <= self.hard_share <= 1, "replay.hard_share", self.hard_share, "from 0 to 1")
        if self.minimum == 0:
            _refuse_idle(
                self,
                "replay.hard_share",
                "replay.minimum is 0",
                "leave it out, or raise replay.minimum",
            )


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What a candidate must prove before it serves.

    ``flip_rate`` is the share of a stratum's pairs that an update may turn over, in both directions
    together, and still count as harmless: the retention margin is widened to what such an update
    would show by chance. Strata of fewer than ``min_stratum`` pairs are pooled with their siblings.
    Of the pairs held out on earlier nights, ``max_old_pairs`` at most sit the exam.
    """

    confidence: float = 0.95
    min_pairs: int = 200
    retention_margin: float = 0.03
    flip_rate: float = 0.1
    min_stratum: int = 50
    max_old_pairs: int = 1000
    kl_budget: float = 0.15
    distinct_floor: float = 0.9
    length_ratio: tuple[float, float] = (0.8, 1.25)

    def __post_init__(self) -> None:
        _require(0.5 < self.confidence < 1, "gate.confidence", self.confidence, "from .5 to 1")
        _require(self.min_pairs >= 1, "gate.min_pairs", self.min_pairs, "1 or more")
        _require(
            self.retention_margin >= 0, "gate.retention_margin", self.retention_margin, "0 or more"
        )
        _require(0 <= self.flip_rate <= 1, "gate.flip_rate", self.flip_rate, "from 0 to 1")
        _require(self.min_stratum >= 1, "gate.min_stratum", self.min_stratum, "1 or more")
        _require(self.max_old_pairs >= 1, "gate.max_old_pairs", self.max_old_pairs, "1 or more")
        _require(self.kl_budget > 0, "gate.kl_budget", self.kl_budget, "above 0")
        _require(self.distinct_floor >= 0, "gate.distinct_floor", self.distinct_floor, "0 or more")
        ratio = self.length_ratio
        _require(
            len(ratio) == 2 and 0 < ratio[0] <= 1 <= ratio[1],
            "gate.length_ratio",
            ratio,
            "two numbers around 1, as in (0.8, 1.25)",
        )


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """Everything that one update can be told. ``None`` means: chosen by the data or the model.

    ``max_minutes`` is the time that the whole update may take, with no limit where it is ``None``.
    """

    seed: int = 0
    held_out: float = 0.2
    batch_size: int = 16
    learning_rate: float | None = None
    epochs: int | None = None
    max_length: int = 1024
    precision: Precision = "auto"
    max_minutes: float | None = None
    lora: LoraSettings = field(default_factory=LoraSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    thumbs: ThumbSettings = field(default_factory=ThumbSettings)
    kl: KLSettings = field(default_factory=KLSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    gate: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self) -> None:
        _require(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _require(
            self.learning_rate is None or self.learning_rate > 0,
            "learning_rate",
            self.learning_rate,
            "above 0",
        )
        _require(self.epochs is None or self.epochs >= 1, "epochs", self.epochs, "1 or more")
        _require(self.max_length >= 16, "max_length", self.max_length, "16 tokens or more")
        _require(
            self.precision in get_args(Precision),
            "precision",
            self.precision,
            "auto, float32, bfloat16 or 4bit",
        )
        _require(
            self.max_minutes is None or self.max_minutes > 0,
            "max_minutes",
            self.max_minutes,
            "above 0",
        )

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> UpdateConfig:
        """Build a config from nested mappings, as read from TOML or ``--set loss.beta=0.2``.

        Raises:
            ConfigError: for a key that does not exist (the nearest one is suggested) or a value
                of the wrong type or out of range.
        """
        return _build(cls, settings, prefix="")

    def to_mapping(self) -> dict[str, Any]:
        """The config as nested plain values: what reports and manifests store."""
        return asdict(self)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}, but must be {allowed}")


def _refuse_idle(group: Any, name: str, because: str, cure: str) -> None:
    """Refuse a setting that was changed where another one leaves it without effect."""
    key = name.rpartition(".")[2]
    value = getattr(group, key)
    if value != next(f.default for f in fields(group) if f.name == key):
        raise ConfigError(f"{name} is {value!r}, but has no effect, since {because}: {cure}")


def _build(kind: type[T], settings: Mapping[str, Any], prefix: str) -> T:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(_unknown_key(prefix + key, [prefix + name for name in known]))
        values[key] = _coerce(known[key].default_factory, value, prefix + key)
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(
            f"a setting under {prefix or 'the top level'!r} has the wrong type: {error}"
        ) from error


def _coerce(group: Any, value: Any, name: str) -> Any:
    if not is_dataclass(group):
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is a group of settings: write {name}.KEY=VALUE, not {value!r}")
    return _build(group, value, prefix=name + ".")  # type: ignore[arg-type]


def _unknown_key(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(sorted(known))}"
    return f"no setting is named {name!r}; {hint}"
