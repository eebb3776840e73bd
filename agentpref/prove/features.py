"""Features of answers: what can be read off a text without a model.

A feature is a number that describes the text of an answer: how long it is, how it is laid
out, whether it calls a tool, refuses, or breaks off. No model is needed. Those of chosen and
rejected answers say what pairs ask for (:mod:`agentpref.prove.asked`); those of what live and the
candidate write say whether it is written. Whether an answer is *true* no feature tells: scorers do
(:mod:`agentpref.prove.checks`).

Lists of words are short: refusals and languages are recognised in a few languages only, and in
others these features are 0.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

from agentpref.models.tool_calls import assistant_message, parse_rate

Features: TypeAlias = Mapping[str, float]
"""The features of one answer by name; one that is missing is 0."""

LABEL_WORDS = 3
"""Answers of so few words are labels, as of an app that answers yes or no."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’][^\W_]+)*")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_MARKER = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+", re.MULTILINE)
_HEADING = re.compile(r"^[ \t]*#{1,6}[ \t]+\S|^[ \t]*\*\*[^*\n]+\*\*:?[ \t]*$", re.MULTILINE)
_OPENING = re.compile(r"\s*([^\n,.!:;?]{1,40}[\n,.!:;?])")
_SENTENCE_MARKS = frozenset(".!?…。؟।\"'”’»)]}*`>|\uff01\uff1f")  # the last two are wide ! and ?
_QUESTION, _EXCLAMATION = re.compile("[?\uff1f]"), re.compile("[!\uff01]")
_HANGING = ",(-–—/&+=[{"
_REFUSAL = re.compile(
    r"\b(?:i can(?:no|')t|i(?: am|'m) (?:unable|not able|sorry,? but)|i won't|as an ai|"
    r"ich kann (?:\w+ ){0,6}nicht|es tut mir leid|je ne peux pas|(?:je suis )?désolée?\b|"
    r"lo siento|no puedo|mi dispiace|non posso|não posso|desculpe)"
    r"|抱歉|无法|不能|申し訳|できません",
)
_FUNCTION_WORDS = {
    "English": "the of and to in is that it for with as was are this be on by an at from",
    "German": "der die und das ist den von zu mit sich auf ein eine nicht dem des als auch im",
    "French": "le les et des est un une dans que pour qui sur pas au avec ce sont du",
    "Spanish": "el los y las es un una en que por con para se del al lo su más como",
    "Italian": "il di che è un una per non con si della sono gli nel alla dei",
    "Portuguese": "o os e do da em um uma que não com para por mais dos ao",
    "Dutch": "de het een van en is dat niet op zijn met voor er aan ook",
}
_YES = frozenset({"yes", "yeah", "yep", "ja", "oui", "sí", "si", "sim", "да", "はい", "是"})
_NO = frozenset({"no", "nope", "nein", "non", "não", "нет", "いいえ", "否", "不"})
_BY_LANGUAGE = {name: frozenset(words.split()) for name, words in _FUNCTION_WORDS.items()}
_NEVER_LAST = frozenset(
    word
    for words in (
        "the a an of and or to in is are was were be that with as for by from at on their its your",
        "my our his her because which than into if but der die das und oder mit von zu ein eine im",
        "le la les des et ou une dans el los las y para con una il di che per",
    )
    for word in words.split()
)
SCRIPTS = (
    "Latin", "Cyrillic", "Greek", "CJK", "Hiragana", "Katakana", "Hangul", "Arabic", "Hebrew",
    "Devanagari", "Thai",
)  # fmt: skip
_LETTERS_READ = 400
_TOO_OFTEN = 5


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; of Chinese and Japanese, each character."""
    return _WORD.findall(text.casefold())


def is_blank(text: str) -> bool:
    """Whether an answer says nothing: no letter, no digit and no symbol such as an emoji."""
    return not any(unicodedata.category(character)[0] in "LNS" for character in text)


def is_degenerate(text: str) -> bool:
    """Whether an answer says the same over and over.

    It does if a word or a passage comes three times or more on end and fills half of at least eight
    words, if the whole answer is a passage of four words or more said twice, or if of forty words
    or more fewer than three in ten runs of three words are distinct. The numbers of a list do not
    count: small models loop through "1. Use a fan", "2. Use a fan". A shorter answer does if a word
    comes five times on end, as nobody says it for emphasis.

    >>> is_degenerate("Yes " * 24), is_degenerate("No " * 6), is_degenerate("no, no, no")
    (True, True, False)
    """
    words = words_of(_MARKER.sub("", text))
    size = len(words)
    if size < 8:
        return _stammers(text)
    runs = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(runs)) / len(runs)
    if distinct > 0.75:  # what is repeated as above leaves fewer
        return False
    if size >= 40 and distinct < 0.3:
        return True
    # What fills half of the words holds one of those in the middle, and has it again a period away.
    middle = ((size - 1) // 2, size // 2)
    periods = {abs(at - i) for at in middle for i in range(size) if words[i] == words[at]}
    for period in sorted(periods & set(range(1, size // 2 + 1)) | {size // 2}):
        length = _longest_run(words, period)
        stretch = period + length
        if length >= 2 * period and stretch >= max(8, size / 2):
            return True
        if period >= 4 and stretch == size and length == period:
            return True
    return False


def _stammers(text: str) -> bool:
    """Whether a word comes five times on end; a list says it of so many things, and numbers may.

    Words are what stands between spaces here: one of Chinese or Hindi has several characters.
    """
    if len(_LIST_ITEM.findall(text)) > 1:
        return False
    words = [word for part in text.split() if (word := tuple(words_of(part)))]
    times = max(
        (sum(1 for _ in same) for word, same in groupby(words) if _is_said(word)), default=0
    )
    return times >= _TOO_OFTEN


def _is_said(word: Sequence[str]) -> bool:
    return not any(map(str.isdigit, "".join(word)))


def _longest_run(words: Sequence[str], period: int) -> int:
    """The longest run of words that are the same as the one ``period`` before."""
    longest = run = 0
    for before, word in zip(words, words[period:], strict=False):
        run = run + 1 if word == before else 0
        longest = max(longest, run)
    return longest


def is_broken_off(text: str) -> bool:
    """Whether an answer of four words or more stops where no sentence can end.

    Its last word asks for another one ("because the"), or it ends in a comma or an open bracket. An
    answer without a full stop is not broken off: some people like that.
    """
    text = text.rstrip()
    words = words_of(text)
    if len(words) < 4:
        return False
    return text[-1] in _HANGING or (words[-1] in _NEVER_LAST and text[-1].isalpha())


def is_cut_from(text: str, whole: str) -> bool:
    """Whether an answer of four words or more is the beginning of another, cut between two words.

    >>> is_cut_from("I have booked a table", "I have booked a table for two.")
    True
    """
    text = text.rstrip()
    rest = whole[len(text) :] if whole.startswith(text) else ""
    between_words = text[-1:].isalnum() and rest[:1].isspace() and rest[1:2].isalnum()
    return between_words and len(words_of(text)) >= 4


def opening(text: str) -> str | None:
    """How an answer opens: up to its first mark, or its first three words; ``None`` of a label.

    >>> opening("Certainly! The shop opens at nine."), opening("Yes")
    ('certainly', None)
    """
    found = _OPENING.match(text)
    size = len(words_of(text))
    first = words_of(found[1]) if found else []
    first = first if 0 < len(first) <= 4 else words_of(text)[:3]
    return " ".join(first) if len(first) < size else None


def set_phrases(texts: Sequence[str]) -> frozenset[str]:
    """The openings of at least a tenth of some answers, and of at least four of them."""
    counts = Counter(filter(None, map(opening, texts)))
    least = max(4, math.ceil(len(texts) / 10))
    return frozenset(phrase for phrase, count in counts.items() if count >= least)


def features(text: str, *, tokens: int, phrases: frozenset[str] = frozenset()) -> dict[str, float]:
    """Read the features of an answer.

    Args:
        text: what servers would send, tool calls included.
        tokens: how many tokens it has, its end token included.
        phrases: the set phrases to look for at its beginning, of :func:`set_phrases`.
    """
    words, plain = words_of(text), text.casefold().replace("’", "'")
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    calls = parse_rate([text])
    valid = calls is not None and bool(assistant_message(text).get("tool_calls"))
    found: dict[str, float] = {
        "tokens": tokens,
        "words": len(words),
        "lines": len([line for line in text.splitlines() if line.strip()]),
        "list items": len(_LIST_ITEM.findall(text)),
        "headings": len(_HEADING.findall(text)),
        "code blocks": text.count("```") // 2,
        "questions": len(_QUESTION.findall(text)),
        "exclamation marks": len(_EXCLAMATION.findall(text)),
        "digits": sum(map(str.isdigit, text)),
        REPEATS: 1 - len(set(grams)) / len(grams) if grams else 0.0,
        "set phrase at the beginning": opening(text) in phrases,
        "yes at the beginning": bool(words) and words[0] in _YES,
        "no at the beginning": bool(words) and words[0] in _NO,
        "JSON": _is_json(text),
        "tool call": calls is not None,
        "valid tool call": valid,
        "refusal": _REFUSAL.search(plain[:300]) is not None,
        "sentence mark at the end": text.rstrip()[-1:] in _SENTENCE_MARKS and bool(text.strip()),
        "broken off": is_broken_off(text),
        "blank": is_blank(text),
        "repeats itself": is_degenerate(text),
    }
    found.update(_letters(text))
    language = _language(words)
    if language is not None:
        found[f"{LANGUAGE}{language}"] = 1.0
    return {name: float(value) for name, value in found.items() if value}


REPEATS = "repeated runs of four words"
"""The feature that grows as an answer says parts of itself again."""

HARM = frozenset({"broken off", "blank", "repeats itself", REPEATS})
"""Features that nobody can ask for: the gate refuses a candidate whose answers gain in them."""

LENGTHS = frozenset({"tokens", "words"})


LANGUAGE = "written in "
"""How the feature of a language begins. An answer of a few words has none."""


def _letters(text: str) -> dict[str, float]:
    """The share of each script in the first letters of a text."""
    letters = [c for c in text[: 3 * _LETTERS_READ] if c.isalpha()][:_LETTERS_READ]
    counts = Counter(unicodedata.name(c, "?").partition(" ")[0] for c in letters)
    return {
        f"{script} letters": counts[script.upper()] / len(letters)
        for script in SCRIPTS
        if counts[script.upper()]
    }


def _language(words: Sequence[str]) -> str | None:
    """The language whose function words are the most, if they are an eighth of five or more."""
    counts = {name: sum(map(known.__contains__, words)) for name, known in _BY_LANGUAGE.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if len(words) >= 5 and counts[best] >= len(words) / 8 else None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


CANNED = 0.8
"""The share of answers to distinct prompts that are one text, from which on they are canned."""

_ALL_BUT_A_FEW = 0.95


def most_common(texts: Sequence[str]) -> tuple[float, int]:
    """The share of the most common answer among some, and how many words it has."""
    if not texts:
        return 0.0, 0
    text, count = Counter(map(_folded, texts)).most_common(1)[0]
    return count / len(texts), len(words_of(text))


def gathered(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """How many answers became the one that is the most common now, and how many were it before."""
    old, new = ([_folded(text) for text in side] for side in (before, after))
    text = max(new, key=new.count, default="")
    became = [(b == text, a == text) for b, a in zip(old, new, strict=True)]
    return became.count((False, True)), became.count((True, False))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def is_canned(share: float, words: int, usual: float, wanted: float = 1.0) -> bool:
    """Whether most answers are one text that was not usual.

    A label may be the answer to most prompts of an app that answers yes or no, and a policy that is
    still learning leans to one. It is canned where it answers all but a few prompts, and the chosen
    answers are nearly all the same, too (``wanted``), or much more varied than that.

    Args:
        share: that of the most common answer.
        words: how many it has.
        usual: that share among the answers that it is compared with.
        wanted: that share among chosen answers to the same prompts.
    """
    is_label = words <= LABEL_WORDS
    if share < (_ALL_BUT_A_FEW if is_label else CANNED) or usual >= CANNED:
        return False
    return not (is_label and 0.75 <= wanted < _ALL_BUT_A_FEW)


def mean(answers: Sequence[Features], name: str) -> float:
    """The mean of a feature over some answers; 0 of none."""
    return sum(one.get(name, 0.0) for one in answers) / len(answers) if answers else 0.0


def vote(old: Features, new: Features, name: str, sign: int) -> int:
    """1 where an answer has more of a feature than the old one (``sign`` −1: less), −1, or 0."""
    change = (new.get(name, 0.0) - old.get(name, 0.0)) * sign
    return (change > 0) - (change < 0)


def votes(
    live: Sequence[Features], candidate: Sequence[Features], name: str, sign: int
) -> tuple[int, int]:
    """How many answers have more of a feature than live's, and how many less (or ``sign`` −1)."""
    moved = [vote(*pair, name, sign) for pair in zip(live, candidate, strict=True)]
    return moved.count(1), moved.count(-1)
