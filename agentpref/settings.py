"""What a group of settings is declared with: descriptions, bounds, choices, and clear errors.

pydantic checks every value in strict mode: `true` is no number, `2.0` no whole number, and infinity
and NaN are refused. An unknown name is refused with the nearest known one, and so is a setting that
another setting leaves without effect.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, core_schema

from agentpref import plugins
from agentpref.errors import ConfigError

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

LARGEST = 2**32 - 1
"""The largest whole number that a setting takes."""

_REMOVED = {
    "gate.min_pairs": "a gain is proven by a test that is valid at any number of pairs; leave it "
    "out, or raise gate.confidence to ask for more evidence",
}

_SHOWN = 200
"""So many characters of a wrong value are shown."""

T = TypeVar("T")


class OneOf(NamedTuple):
    """Field metadata: the allowed values, looked up when a value is checked."""

    choices: Callable[[], Iterable[object]]

    def __get_pydantic_core_schema__(self, kind: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(kind))

    def _check(self, value: T) -> T:
        if value not in self.choices():
            raise ValueError("not one of the choices")
        return value


def fields_of(kind: Any) -> dict[str, Any]:
    """The pydantic declarations of a group's fields."""
    return kind.__pydantic_fields__  # type: ignore[no-any-return]


def setting(default: T, description: str, **constraints: Any) -> T:
    """Declare a setting, with pydantic's constraints: ``ge`` and ``le``, ``gt`` and ``lt``."""
    declared: T = Field(default=default, description=description, **constraints)
    return declared


def group(prefix: str, *, switch: str | None = None) -> Callable[[type[T]], type[T]]:
    """Class decorator: make errors ``ConfigError``, with names that begin with ``prefix``.

    Where the setting ``switch`` is 0, it turns the others off, and they must stay as they are.
    """

    def decorate(kind: type[T]) -> type[T]:
        validate: Callable[..., None] = kind.__init__

        @wraps(validate)
        def checked(self: T, **settings: Any) -> None:
            try:
                validate(self, **settings)
            except ValidationError as error:
                raise _explained(kind, prefix, error.errors()[0], settings) from error
            for name in fields_of(kind):
                value = getattr(self, name)
                if isinstance(value, int) and value > LARGEST:
                    raise ConfigError(f"{prefix}{name} is {value}, but may be {LARGEST:,} at most")
            if switch and not getattr(self, switch):
                off = prefix + switch
                cure = f"leave it out, or raise {off}"
                for name in (name for name in fields_of(kind) if name != switch):
                    refuse_idle(self, prefix + name, f"{off} is 0", cure)

        kind.__init__ = checked  # type: ignore[method-assign, assignment]
        return kind

    return decorate


def allowed(field: Any) -> str:
    """Say in words which values a setting takes, from its declaration."""
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not NoneType]
    origin = typing.get_origin(field.annotation)
    if origin is Literal:
        return _listed(kinds)
    words = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    if words:  # a number with bounds of its own, or a word
        number = _bounded("a number", kinds[0].__metadata__[0].metadata)
        return f"{number}, or {_listed(typing.get_args(words[0]))}"
    if origin is tuple and kinds[-1:] == [Ellipsis]:
        most = next(one.max_length for one in kinds[0].__metadata__[0].metadata
                    if hasattr(one, "max_length"))  # fmt: skip
        return f"a list of texts that say something, of {most:,} characters at most each"
    if origin is tuple:
        parts = (_bounded("a number", item.__metadata__[0].metadata) for item in kinds)
        return f"[{', '.join(parts)}]"
    for constraint in field.metadata:
        if isinstance(constraint, OneOf):
            return _listed(constraint.choices())
    kind = kinds[0] if kinds else field.annotation
    if kind is bool:
        return "true or false"
    if origin is dict:
        return "a group of names and values"
    return _bounded("a whole number" if kind is int else "a number", field.metadata)


def _bounded(noun: str, constraints: Iterable[object]) -> str:
    words = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}
    bound = {name: getattr(c, name) for c in constraints for name in words if hasattr(c, name)}
    if bound.keys() == {"ge", "le"}:
        return f"{noun} from {bound['ge']} to {bound['le']}"
    if bound.keys() == {"ge"}:
        return f"{noun} of {bound['ge']} or more"
    bounds = " and ".join(f"{words[name]} {value}" for name, value in bound.items())
    return f"{noun} {bounds}".rstrip()


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
    key, known = str(error["loc"][0]), fields_of(kind)
    name = prefix + key
    if name in _REMOVED:
        return ConfigError(f"{name} is no setting any more: {_REMOVED[name]}")
    if key not in known:
        hint = plugins.suggest(name, [prefix + other for other in known])
        return ConfigError(f"no setting is named {name!r}; {hint}")
    value, kinds = settings[key], known[key].annotation
    if is_dataclass(known[key].annotation):
        return ConfigError(
            f"{name} is a group of settings: write {name}.KEY=VALUE, or "
            f"{kinds.__name__}(KEY=VALUE) in Python, not {value!r}"
        )
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return ConfigError(f"{name} is {shown}, but must be {allowed(known[key])}")


def refuse_idle(settings: Any, name: str, because: str, cure: str) -> None:
    """Refuse a setting that was changed where another one leaves it without effect."""
    key = name.rpartition(".")[2]
    value = getattr(settings, key)
    if value != fields_of(type(settings))[key].default:
        raise ConfigError(f"{name} is {value!r}, but has no effect, since {because}: {cure}")
