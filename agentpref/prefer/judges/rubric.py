"""A judge's rubric: a Markdown file with front matter, ``judges/NAME.md`` in the home.

The front matter names the model that judges and the principles that it judges by; the text below is
what the judge is told beside them. A rubric is a version of its judge: its digest covers all that
its verdicts depend on, and a judge with another digest has to be calibrated again.

>>> rubric = parse("brief", '''---
... model: gpt-4o-mini
... principles:
...   - name: brief
...     text: Prefer the answer that says it in fewer words.
... ---
... ''')
>>> rubric.principles[0].name, rubric.engine
('brief', 'openai')
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import orjson
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from agentpref.errors import JudgeError, MissingDependency
from agentpref.home import Home, open_private, reading

LONGEST_TEXT = 4_000
"""Characters of one principle, or of an example's answer, at most: a judge reads them each time."""

LONGEST_RUBRIC = 40_000
"""Characters of a whole rubric, at most."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)(.*)\Z", re.DOTALL)
_STRICT = ConfigDict(extra="forbid", str_strip_whitespace=True)
_WITHOUT_EFFECT = ("timeout", "price", "api_key_env", "name", "source")
"""What changes no verdict, and so makes no new version."""

_Dollars = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT)]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Principle:
    """One thing to judge by; of those that are drawn, heavier ones come more often."""

    text: _Text
    name: str = Field(default="", max_length=60)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Demonstration:
    """A comparison whose verdict is known, shown to the judge before each question."""

    prompt: _Text
    a: _Text
    b: _Text
    winner: Literal["a", "b", "tie"]
    why: str = Field(default="", max_length=LONGEST_TEXT)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class Rubric:
    """All that a judge is asked with.

    ``engine`` is the name of an entry point in ``agentpref.judges``; its other settings are for
    that engine. ``samples`` above 1 asks so often, at ``temperature``, and takes the majority.
    ``draw`` principles are drawn for each comparison, by weight; 0 shows all. ``scale`` 2 has the
    verdicts a and b, 3 a tie beside. A verdict with less than ``min_confidence`` is a tie. With
    ``control`` an answer that wins is also asked about beside the point, so that one that speaks to
    its judge does not win.
    ``timeout`` is in seconds for one call, ``price`` in dollars for a million tokens, read and
    written. ``members`` are the judges of a panel.
    """

    name: str
    text: str = ""
    engine: str = "openai"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: int = Field(default=400, ge=8, le=16_384)
    samples: int = Field(default=1, ge=1, le=25)
    timeout: float = Field(default=60.0, gt=0, le=3600)
    price: tuple[_Dollars, _Dollars] | None = None
    draw: int = Field(default=0, ge=0)
    scale: Literal[2, 3] = 3
    min_confidence: float = Field(default=0.0, ge=0, le=1)
    control: bool = True
    principles: tuple[Principle, ...] = ()
    examples: tuple[Demonstration, ...] = ()
    members: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.engine == "panel":
            if len(set(self.members)) < 2:
                raise ValueError("members must name two judges or more")
        elif not (self.principles or self.text.strip()):
            raise ValueError(
                "there is no principle and no text, so nothing to judge by; write one under "
                "principles, or text below the front matter"
            )
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"samples is {self.samples} with temperature 0, which says the same "
                f"{self.samples} times; set temperature to .7, say"
            )
        if self.draw > len(self.principles):
            raise ValueError(
                f"draw is {self.draw}, but there are {len(self.principles)} principles"
            )

    @property
    def digest(self) -> str:
        """The version of the judge, 16 hex digits."""
        what = {k: v for k, v in asdict(self).items() if k not in _WITHOUT_EFFECT}
        content = orjson.dumps(what, option=orjson.OPT_SORT_KEYS)
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def drawn(self, seed: str) -> tuple[Principle, ...]:
        """The principles for one comparison, the same for both of its orders.

        Args:
            seed: what makes the comparison another one than others.
        """
        if not self.draw:
            return self.principles
        # Efraimidis and Spirakis 2006: the k largest u^(1/w) are a weighted sample of k.
        source = random.Random(f"{self.digest} {seed}")
        keys = {one: source.random() ** (1 / one.weight) for one in self.principles}
        chosen = sorted(self.principles, key=keys.__getitem__, reverse=True)[: self.draw]
        return tuple(one for one in self.principles if one in chosen)


def _once(loader: Any) -> Any:
    """A safe loader of YAML that refuses a key that is there twice, of which it would take one."""
    from yaml.constructor import ConstructorError

    class Once(loader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set[Any]()
            for key, _ in node.value:
                if key.value in seen:
                    raise ConstructorError(None, None, f"{key.value!r} is twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    return Once


def parse(name: str, text: str) -> Rubric:
    """Read the text of a rubric's file.

    Raises:
        JudgeError: it has no front matter, a setting is unknown or out of range, or it is too long;
            the message names the setting and the cure.
        MissingDependency: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("rubrics need PyYAML: pip install 'agentpref[judge]'") from error

    where = f"judge {name!r}"
    if len(text) > LONGEST_RUBRIC:
        raise JudgeError(
            f"{where} has {len(text):,} characters, but may have {LONGEST_RUBRIC:,}: a judge reads "
            "all of it for each question; shorten it"
        )
    found = _FRONT.match(text)
    if found is None:
        raise JudgeError(
            f"{where} has no front matter: begin the file with a line ---, the settings, and "
            f"another line ---; `agentpref judge new` writes a template"
        )
    try:
        settings = yaml.load(found[1], Loader=_once(yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise JudgeError(f"the front matter of {where} is not YAML: {error}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise JudgeError(f"the front matter of {where} must be settings: a name, a colon, a value")
    for given in ("name", "text", "source"):
        if given in settings:
            raise JudgeError(f"{given!r} is no setting of {where}; leave it out")
    settings = {**settings, "principles": _principles(settings.get("principles"))}
    try:
        return Rubric(name=name, text=found[2].strip(), source=text, **settings)
    except ValidationError as error:
        raise JudgeError(f"{where}: {_explained(error)}") from error


def _principles(given: Any) -> Any:
    """Principles that were written as plain lines get names of their own."""
    if given is None:
        return ()
    if not isinstance(given, list):
        return given
    made = []
    for number, one in enumerate(given, start=1):
        one = {"text": one} if isinstance(one, str) else one
        if isinstance(one, Mapping):
            one = {**one, "name": str(one.get("name") or f"principle {number}")}
        made.append(one)
    return made


def _explained(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    known = ", ".join(
        name for name in Rubric.__dataclass_fields__ if name not in ("name", "source")
    )
    if first["type"] == "unexpected_keyword_argument":
        return f"{place!r} is no setting; known: {known}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    value = "" if place == "" else f"{place} is {str(first['input'])[:60]!r}: "
    return f"{value}{first['msg'].replace('valid tuple', 'list')}"


def check_name(name: str) -> str:
    """Return the name of a judge, which is also that of its file; ``JudgeError`` for no name."""
    if _NAME.fullmatch(name) is None:
        raise JudgeError(
            f"{name[:80]!r} is no name of a judge; use small letters, digits, - and _, beginning "
            "with a letter or a digit"
        )
    return name


def read(home: Home, name: str) -> Rubric:
    """Read a judge of a home.

    Raises:
        JudgeError: there is none of that name, or its file is no rubric.
    """
    path = home.judges / f"{check_name(name)}.md"
    if not path.is_file():
        known = ", ".join(names(home)) or "none"
        raise JudgeError(
            f"no judge {name!r} is in {home.judges}; there are: {known}; `agentpref judge new "
            f"{name}` writes a template"
        )
    with reading(path) as file:
        content = file.read(4 * LONGEST_RUBRIC + 1)
    try:
        return parse(name, content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise JudgeError(f"{path} is not UTF-8; save it as UTF-8") from error


def names(home: Home) -> list[str]:
    """The names of the rubrics of a home, in alphabetical order."""
    found = home.judges.glob("*.md") if home.judges.is_dir() else []
    return sorted(path.stem for path in found if _NAME.fullmatch(path.stem) and path.is_file())


def write(home: Home, name: str, text: str) -> Rubric:
    """Write the rubric of a new judge, checked; ``JudgeError`` if there is one of that name."""
    from agentpref.home import make_private_folder, writing

    rubric = parse(check_name(name), text)
    path = home.judges / f"{name}.md"
    with writing(home.judges):
        make_private_folder(home.judges)
        try:
            with open(path, "x", encoding="utf-8", opener=open_private) as file:
                file.write(text)
        except FileExistsError as error:
            raise JudgeError(f"{path} is there already; edit it, or choose another name") from error
    return rubric


TEMPLATE = """\
---
# What judges. openai: any server that speaks OpenAI's API (base_url). langchain: any chat model of
# LangChain, as provider:model. transformers: a folder or a hub's name, in this process.
# panel: several judges together (members: [one, another]).
engine: openai
model: {model}
{base_url}api_key_env: OPENAI_API_KEY   # the environment variable that has the key
temperature: 0
# price: [0.15, 0.60]         # dollars for a million tokens read and written, for --max-cost
# samples: 5                  # ask so often at a temperature above 0, and take the majority
# min_confidence: 0.7         # a verdict of which the judge is less sure is a tie

# By what. The judge names the principle that decided.
principles:
  - name: right
    text: Prefer the answer that is correct and does what was asked.
    weight: 3
  - name: brief
    text: Of two correct answers, prefer the one that says it in fewer words.
    weight: 1
# draw: 2                     # show so many of them for each comparison, drawn by weight
scale: 3                      # 2: a or b; 3: a, b or a tie
# control: false              # one call less for each winner, where no answer speaks to its judge

# Comparisons whose verdict is known, shown before each question.
# examples:
#   - prompt: What is the capital of France?
#     a: Paris.
#     b: That is a wonderful question! France is a country in Europe.
#     winner: a
#     why: It answers.
---
Anything else that the judge should know of the app and its users.
"""
"""What `agentpref judge new` writes; ``str.format`` fills in ``model`` and ``base_url``."""
