"""The settings of one update, each declared once: type, bounds, default and description.

    >>> UpdateConfig(seed=1, loss=LossSettings(beta=0.2)).loss.beta
    0.2
    >>> UpdateConfig(batch_size=2.5)
    Traceback (most recent call last):
    agentpref.errors.ConfigError: batch_size is 2.5, but must be a whole number of 1 or more

pydantic checks every value in strict mode, in Python as well as from TOML and ``--set``: `true` is
no number, `2.0` no whole number, and infinity and NaN are refused. An unknown name is refused with
the nearest known one, and so is a setting that another setting leaves without effect. `make docs`
writes the table of settings in docs/updates.md from these declarations.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, core_schema

from agentpref import plugins
from agentpref.errors import ConfigError
from agentpref.types import HELD_OUT, LORA_RANKS

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "4bit"]
"""The number format in which a base model is held."""

NOISY_LOSSES = ("sigmoid", "robust")
"""The losses with a term for flipped labels, which ``loss.noise`` sets."""

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_LONE_THUMBS = "kto"

T = TypeVar("T")


def loss_kinds() -> tuple[str, ...]:
    """The losses of pairs that installed packages register: what ``loss.kind`` may be."""
    return tuple(name for name in plugins.names(plugins.LOSSES) if name != _LONE_THUMBS)


class _OneOf(NamedTuple):
    """Field metadata: the allowed values, looked up when a value is checked."""

    choices: Callable[[], Iterable[object]]

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(kind))

    def _check(self, value: T) -> T:
        if value not in self.choices():
            raise ValueError("not one of the choices")
        return value


def _group(prefix: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: make errors ``ConfigError``, with names that begin with ``prefix``."""

    def decorate(kind: type[T]) -> type[T]:
        validate: Callable[..., None] = kind.__init__

        @wraps(validate)
        def checked(self: T, **settings: Any) -> None:
            try:
                validate(self, **settings)
            except ValidationError as error:
                raise _explained(kind, prefix, error.errors()[0], settings) from error

        kind.__init__ = checked  # type: ignore[method-assign, assignment]
        return kind

    return decorate


@_group("lora.")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter."""

    rank: Annotated[int, _OneOf(lambda: LORA_RANKS)] = Field(
        default=16, description="rank; vLLM loads only these"
    )
    alpha: int = Field(default=32, gt=0, description="the adapter is scaled by α/rank")


@_group("loss.")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class LossSettings:
    """The loss of a pair, and the anchor on the chosen answer."""

    kind: Annotated[str, _OneOf(loss_kinds)] = Field(
        default="sigmoid", description="a registered loss: see training.md"
    )
    beta: float = Field(default=0.1, gt=0, description="temperature β of the loss")
    noise: float | None = Field(
        default=None,
        ge=0,
        le=0.5,
        description="share ε of flipped labels; None: each pair's own. Only for sigmoid and "
        "robust (there below 0.5)",
    )
    wpo: bool = Field(
        default=False,
        description="weigh answers that the live revision did not write by how likely they are "
        "under it (2406.11827)",
    )
    nll: float = Field(default=0.1, ge=0, description="weight α of the NLL anchor (2404.19733)")
    nll_on_corrections: float = Field(
        default=1.0, ge=0, description="weight α of the anchor on corrections"
    )

    def __post_init__(self) -> None:
        if self.kind not in NOISY_LOSSES:
            cure = f"leave it out, or set loss.kind to {_listed(map(repr, NOISY_LOSSES))}"
            _refuse_idle(self, "loss.noise", f"loss.kind {self.kind!r} has no noise term", cure)
        if self.kind == "robust" and self.noise == 0.5:
            raise ConfigError(
                "loss.noise is 0.5, at which loss.kind 'robust' divides by zero: such labels are "
                "random; lower it, or set loss.kind to 'sigmoid'"
            )
        if self.kind == "robust" and self.noise == 0:
            cure = "leave it at 'sigmoid', or leave loss.noise out"
            _refuse_idle(self, "loss.kind", "with loss.noise 0 it is plain DPO", cure)


@_group("thumbs.")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class ThumbSettings:
    """The loss of a lone thumb: KTO (2402.01306), in the same batches as the pairs.

    λ that are not given are balanced to the n_D likes and n_U dislikes of the update, so that
    λ_D·n_D = λ_U·n_U: the lower end of the paper's range [1, 4/3]. If neither is given, the mean
    of λ over the thumbs is 1.
    """

    weight: float = Field(
        default=1.0, ge=0, description="weight of a thumb beside a pair's 1; 0 turns thumbs off"
    )
    desirable: float | None = Field(
        default=None, gt=0, description="λ_D, the weight of likes; None: balanced"
    )
    undesirable: float | None = Field(
        default=None, gt=0, description="λ_U, the weight of dislikes; None: balanced"
    )

    def __post_init__(self) -> None:
        if self.weight == 0:
            for name in ("thumbs.desirable", "thumbs.undesirable"):
                cure = "leave it out, or raise thumbs.weight"
                _refuse_idle(self, name, "thumbs.weight is 0", cure)


@_group("kl.")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class KLSettings:
    """The penalty λ·max(0, KL − target), which keeps a candidate near the live revision."""

    weight: float = Field(default=3.0, ge=0, description="weight λ; 0 turns the penalty off")
    target: float = Field(default=0.05, gt=0, description="KL without penalty, in nats per token")

    def __post_init__(self) -> None:
        if self.weight == 0:
            _refuse_idle(self, "kl.target", "kl.weight is 0", "leave it out, or raise kl.weight")


@_group("replay.")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """How many old examples are trained again beside the new ones."""

    minimum: int = Field(
        default=128, ge=0, description="replay at least so many; 0 turns replay off"
    )
    hard_share: float = Field(
        default=0.3, ge=0, le=1, description="share of hard examples; the rest are random"
    )

    def __post_init__(self) -> None:
        if self.minimum == 0:
            cure = "leave it out, or raise replay.minimum"
            _refuse_idle(self, "replay.hard_share", "replay.minimum is 0", cure)


@_group("gate.")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class GateSettings:
    """What a candidate must prove before it serves."""

    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="confidence of one-sided intervals"
    )
    min_pairs: int = Field(
        default=200, ge=1, description="new held-out pairs that a promotion needs"
    )
    retention_margin: float = Field(
        default=0.03, ge=0, description="loss of accuracy that is allowed"
    )
    flip_rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of a stratum's pairs that a harmless update may turn over, both ways "
        "together; the retention margin is widened to what that shows by chance",
    )
    min_stratum: int = Field(
        default=50, ge=1, description="smaller strata are pooled with their siblings"
    )
    max_old_pairs: int = Field(
        default=1000, ge=1, description="evaluate at most so many old held-out pairs"
    )
    kl_budget: float = Field(
        default=0.15, gt=0, description="KL from the base model, in nats per token"
    )
    distinct_floor: float = Field(
        default=0.9, ge=0, description="distinct-2 of the answers, relative to live"
    )
    length_ratio: tuple[
        Annotated[float, Field(gt=0, le=1)],
        Annotated[float, Field(ge=1)],
    ] = Field(
        default=(0.8, 1.25), strict=False, description="length of the answers, relative to live"
    )


@_group("")
@dataclass(config=_STRICT, frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """All settings of one update.

    Instances are immutable and comparable; ``dataclasses.replace(config, seed=1)`` makes a changed,
    checked copy.
    """

    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of everything random")
    held_out: float = Field(
        default=HELD_OUT, gt=0, lt=1, description="share of the prompts that never train"
    )
    batch_size: int = Field(default=16, ge=1, description="examples per step")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak rate; None: from the model's size"
    )
    epochs: int | None = Field(default=None, ge=1, description="None: from the number of new pairs")
    max_length: int = Field(default=1024, ge=16, description="tokens of a prompt with its answer")
    precision: Precision = Field(default="auto", description="number format of the base model")
    max_minutes: float | None = Field(
        default=None, gt=0, description="time for the whole update; None: no limit"
    )
    lora: LoraSettings = Field(default=LoraSettings())
    loss: LossSettings = Field(default=LossSettings())
    thumbs: ThumbSettings = Field(default=ThumbSettings())
    kl: KLSettings = Field(default=KLSettings())
    replay: ReplaySettings = Field(default=ReplaySettings())
    gate: GateSettings = Field(default=GateSettings())

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> UpdateConfig:
        """Build a config from nested mappings, as read from TOML or ``--set loss.beta=0.2``.

        Raises:
            ConfigError: for a key that does not exist (the nearest one is suggested) or a value
                of the wrong type or out of range.
        """
        groups = {name: field.annotation for name, field in _fields(cls).items()}
        return cls(
            **{
                name: groups[name](**value)
                if isinstance(value, Mapping) and is_dataclass(groups.get(name))
                else value
                for name, value in settings.items()
            }
        )

    def to_mapping(self) -> dict[str, Any]:
        """The config as nested plain values: what reports and manifests store."""
        return asdict(self)


def _fields(group: Any) -> dict[str, Any]:
    """The pydantic declarations of a group's fields."""
    return group.__pydantic_fields__  # type: ignore[no-any-return]


def allowed(field: Any) -> str:
    """Say in words which values a setting takes, from its declaration."""
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not NoneType]
    origin = typing.get_origin(field.annotation)
    if origin is Literal:
        return _listed(kinds)
    if origin is tuple:
        return (
            f"[{', '.join(_bounded('a number', item.__metadata__[0].metadata) for item in kinds)}]"
        )
    for constraint in field.metadata:
        if isinstance(constraint, _OneOf):
            return _listed(constraint.choices())
    kind = kinds[0] if kinds else field.annotation
    if kind is bool:
        return "true or false"
    return _bounded("a whole number" if kind is int else "a number", field.metadata)


def _bounded(noun: str, constraints: Iterable[object]) -> str:
    bound = {
        name: getattr(constraint, name)
        for constraint in constraints
        for name in ("gt", "ge", "lt", "le")
        if hasattr(constraint, name)
    }
    if bound.keys() == {"ge", "le"}:
        return f"{noun} from {bound['ge']} to {bound['le']}"
    if bound.keys() == {"ge"}:
        return f"{noun} of {bound['ge']} or more"
    words = {"gt": "above", "lt": "below", "le": "up to"}
    return f"{noun} " + " and ".join(f"{words[name]} {value}" for name, value in bound.items())


def _listed(choices: Iterable[object]) -> str:
    """Join choices as in `a, b or c`."""
    names = [*map(str, choices)]
    return " or ".join([", ".join(names[:-1]), *names[-1:]]) if len(names) > 1 else "".join(names)


def _explained(
    kind: type, prefix: str, error: ErrorDetails, settings: Mapping[str, Any]
) -> ConfigError:
    """Say which setting is wrong, its value, and what is allowed."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause  # of ``__post_init__``
    key, known = str(error["loc"][0]), _fields(kind)
    name = prefix + key
    if key not in known:
        nearest = difflib.get_close_matches(name, [prefix + other for other in known], n=1)
        names = ", ".join(sorted(prefix + other for other in known))
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {names}"
        return ConfigError(f"no setting is named {name!r}; {hint}")
    value = settings[key]
    if is_dataclass(known[key].annotation):
        return ConfigError(
            f"{name} is a group of settings: write {name}.KEY=VALUE, or "
            f"{known[key].annotation.__name__}(KEY=VALUE) in Python, not {value!r}"
        )
    return ConfigError(f"{name} is {value!r}, but must be {allowed(known[key])}")


def _refuse_idle(group: Any, name: str, because: str, cure: str) -> None:
    """Refuse a setting that was changed where another one leaves it without effect."""
    key = name.rpartition(".")[2]
    value = getattr(group, key)
    if value != _fields(type(group))[key].default:
        raise ConfigError(f"{name} is {value!r}, but has no effect, since {because}: {cure}")
