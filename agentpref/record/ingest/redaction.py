"""Takes personal data out of text before it is stored.

:func:`redact` finds what has a form: e-mail addresses, phone and payment card numbers, keys and
passwords. For names and streets, which have none, an app passes a callable of its own, which may
call this one first. Each rule takes time linear in the length of a text, and redacting a redacted
text changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from agentpref.errors import RedactionFailed

Redact: TypeAlias = Callable[[str], str]
"""Takes a text and returns it without what must not be stored."""


def redact(text: str) -> str:
    """Replace e-mail addresses, phone and card numbers, and keys in a text by their kind.

    Phone numbers are found in international form (``+49 30 123456``; ``phonenumbers`` says whether
    the number is possible) and, with separators, in the national forms of most countries
    (``(555) 123-4567``, ``030 1234567``, ``01 23 45 67 89``). Digits without separators stay: most
    are order numbers. Card numbers have an issuer's prefix and length and a correct Luhn digit.
    Keys are recognised by their provider's prefix, by what is before them (``Bearer …``,
    ``password: …``, ``scheme://user:password@``), or as a PEM block.

    >>> redact("mail ada@example.org or call +49 30 1234567")
    'mail [email] or call [phone]'
    """
    lowered = text.lower()
    for rule in _RULES:
        if any(hint in lowered for hint in rule.hints):
            text = rule.pattern.sub(rule.replacement, text)
    return _without_phones(text) if any(digit in text for digit in _DIGITS) else text


def redacted(value: Any, redact: Redact) -> Any:
    """Redact the texts of messages and tools; return the same object if nothing changed.

    The structure stays: the keys of mappings, ``role`` and ``type``, the ids of tool calls, the
    names of functions, and the keywords of a JSON schema. What a call or a schema holds of the
    app's own values has no structure, and neither do the ``arguments`` of a call.

    Raises:
        RedactionFailed: ``redact`` raised, or returned something else than a text.
    """
    return _redacted(value, redact, structured=True)


def redacted_data(value: Any, redact: Redact) -> Any:
    """Redact every text inside a JSON-like value of the app, as :func:`redacted` does.

    Keys of mappings stay; no other text is exempt, whatever its key is called.
    """
    return _redacted(value, redact, structured=False)


def _redacted(value: Any, redact: Redact, structured: bool) -> Any:
    if isinstance(value, str):
        return _redacted_text(value, redact)
    if isinstance(value, Mapping):
        fixed = _fixed_keys(value) if structured else frozenset()
        items = [
            item
            if key in fixed and _is_word(item)
            else _redacted(item, redact, structured and key not in _DATA)
            for key, item in value.items()
        ]
        return value if _same(items, value.values()) else dict(zip(value, items, strict=True))
    if isinstance(value, (list, tuple)):
        items = [_redacted(item, redact, structured) for item in value]
        return value if _same(items, value) else type(value)(items)
    return value


def _redacted_text(text: str, redact: Redact) -> str:
    failed = None
    try:
        safe = redact(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the app's code: whatever it raises, the text is not stored
        failed = f"{type(error).__name__} ({_place(error)})"
    if failed is not None:  # not chained: the message of the app's error may quote the text
        raise RedactionFailed(
            f"redact raised {failed} on a text of {len(text):,} characters, which is not kept; let "
            "the callable take any text"
        )
    if not isinstance(safe, str):
        raise RedactionFailed(
            f"redact returned {type(safe).__name__} for a text of {len(text):,} characters, which "
            "is not kept; let the callable return a str"
        )
    if safe == text:
        return text
    if any("\ud800" <= character <= "\udfff" for character in safe):
        raise RedactionFailed(
            f"redact returned half of a character for a text of {len(text):,} characters, which is "
            "not kept; let the callable return text that UTF-8 can hold"
        )
    return safe


def _place(error: BaseException) -> str:
    """Where an error was raised: the file and the line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "nowhere"


def _same(items: list[Any], originals: Any) -> bool:
    return all(item is original for item, original in zip(items, originals, strict=True))


def _is_word(item: object) -> bool:
    """A text or a list of texts. A property that is named ``type`` is a mapping with prose."""
    return isinstance(item, str) or (
        isinstance(item, (list, tuple)) and all(isinstance(word, str) for word in item)
    )


_MESSAGE = frozenset({"role", "type", "id", "tool_call_id"})
_CALL = frozenset({"type", "id", "name", "tool_call_id", "tool_use_id", "call_id"})
_PART = frozenset({"type"})
_SCHEMA = frozenset({"type", "format", "pattern", "required", "$ref", "$schema", "$id"})

_DATA = frozenset({"arguments", "input", "metadata", "default", "enum", "const", "examples"})
"""Keys under which there are values of the app: of a call, beside a message, in a schema."""

_OF_A_MESSAGE = frozenset({"content", "tool_calls", "function_call", "reasoning_content"})
_OF_A_FUNCTION = frozenset({"arguments", "parameters", "input_schema"})
_KEYS_BY_TYPE = {
    **dict.fromkeys(("function", "custom", "tool_use", "tool_result"), _CALL),
    **dict.fromkeys(("function_call", "function_call_output"), _CALL),
    **dict.fromkeys(("object", "array", "string", "number", "integer", "boolean"), _SCHEMA),
}


def _fixed_keys(value: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys whose texts are structure, by the kind of mapping.

    The ``name`` of a function is structure; the ``name`` of a speaker is not.
    """
    role, kind = value.get("role"), value.get("type")
    if isinstance(role, str) and not _OF_A_MESSAGE.isdisjoint(value):
        return _MESSAGE | {"name"} if role in ("tool", "function") else _MESSAGE
    if not _OF_A_FUNCTION.isdisjoint(value):
        return _CALL
    return _KEYS_BY_TYPE.get(kind, _PART) if isinstance(kind, str) else frozenset()


# The rules of `redact`.
#
# Linear time: a repeated class is bounded, or is followed by something outside the class, or by
# nothing; and lookbehinds keep a match from starting inside text that a failed match has read.
# Idempotent: a number beside a placeholder is judged as it was beside the number it stands for.


class _Rule(NamedTuple):
    """``pattern`` is tried if one of the ``hints`` is in the text in lower case."""

    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]


_DIGITS = tuple("0123456789")
_NAMED = ("passw", "passphrase", "pwd", "secret", "token", "api", "access", "private")
_PREFIXES = (
    *("sk-", "sk_", "rk_", "whsec_", "akia", "asia", "ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    *("github_pat_", "glpat-", "xox", "xapp-", "aiza", "ya29.", "hf_", "gsk_", "npm_", "r8_"),
    *("lsv2_", "pypi-", "sg.", "eyj"),
)
_BEFORE = r"(?<![\w\]])(?<![0-9\]][-./,])"
_AFTER = r"(?![\w])(?![-.,]?\[(?:card|email|key|phone)\])(?![-./,][0-9])"

_EMAIL = re.compile(
    r"(?<![\w.+%\]-])[\w.+%-]{1,64}@(?![0-9]x\.)(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}"
)

_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:[^-]*(?:-(?!----)[^-]*)*-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:\s+[A-Za-z0-9+/=]{16,})*)"  # a block without its end
)
_PROVIDER = re.compile(
    r"""(?<![\w-])(?:
        sk-[\w-]{16,}                           # OpenAI, Anthropic, OpenRouter, Langfuse, …
      | [sr]k_(?:live|test)_\w{10,}             # Stripe
      | whsec_\w{10,}
      | (?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)         # AWS
      | gh[pousr]_[A-Za-z0-9]{20,}              # GitHub
      | github_pat_\w{20,}
      | glpat-[\w-]{16,}                        # GitLab
      | xox[abeoprs]-[A-Za-z0-9-]{10,}          # Slack
      | xapp-[A-Za-z0-9-]{10,}
      | AIza[\w-]{30,}                          # Google
      | ya29\.[\w.-]{20,}
      | hf_[A-Za-z0-9]{20,}                     # Hugging Face
      | (?:gsk|npm|r8)_[A-Za-z0-9]{20,}         # Groq, npm, Replicate
      | lsv2_\w{20,}                            # LangSmith
      | pypi-[\w-]{20,}
      | SG\.[\w-]{16,}\.[\w-]{16,}              # SendGrid
      | eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*){1,3}   # JSON web tokens
    )""",
    re.ASCII | re.VERBOSE,
)
_BEARER = re.compile(r"\b(bearer|authorization: basic)( {1,4})([\w.~+/=-]{8,})", re.I | re.ASCII)
_USERINFO = re.compile(r"(?<=://)[^\s/:@\[\]]{0,256}:[^\s/@]{1,256}(?=@)")

_NAMES = r"""(?:
    passw(?:or)?d | passphrase | pwd | secret | (?:access|private|secret|api)[_\ -]?key(?:[_-]?id)?
  | (?:access|api|auth|bot|refresh|session)[_-]?token | (?<![a-z_-])token
)"""
_ASSIGNED = re.compile(
    rf"""({_NAMES}(?:\\?["'`])?\]?\s{{0,8}}(?:[:=]{{1,2}}>?|\bis\b:?)\s{{0,8}})
    (?: (\\?["'`])([^"'`\\\n]{{4,}})                   # quoted
      | ([^\s"'`\\,;&<>(){{}}\[\]]{{6,}})                # not quoted
    )""",
    re.I | re.VERBOSE,
)

_CARD = re.compile(
    rf"""{_BEFORE}(?:
        [2-6][0-9]{{12,18}}
      | [2-6][0-9]{{3}}([ .\u00a0\u202f-])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}
      | 3[0-9]{{3}}([ .\u00a0\u202f-])[0-9]{{6}}\2[0-9]{{4,5}}
    ){_AFTER}""",
    re.VERBOSE,
)
_ISSUERS = re.compile(
    r"""4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})                   # Visa
      | (?:5[1-5]|2[2-7])[0-9]{14}                           # Mastercard, Mir
      | 3[47][0-9]{13}                                       # American Express
      | 3(?:0[0-5]|[689][0-9])[0-9]{11}                      # Diners Club
      | 35[0-9]{14}                                          # JCB
      | 6(?:011|4[4-9]|5[0-9]|2[0-9])[0-9]{12,16}            # Discover, UnionPay
      | (?:5[06-8]|6[37])[0-9]{11,17}                        # Maestro
    """,
    re.VERBOSE,
)

_SEPARATOR = r"(?:[ \u00a0\u202f./-]|[ -]?\(|\)[ -]?|\ -\ )?"
_PHONE = re.compile(
    rf"""{_BEFORE}(?:
        \+(?!0|[0-9]{{4}}\ [0-9]{{4}}-)\(?[0-9](?:{_SEPARATOR}[0-9]){{7,14}}      # international
      | 00(?!0)[0-9]{{1,3}}(?:[ ./-][0-9]{{2,12}}){{1,5}}
      | (?:1[ .-])?[2-9][0-9]{{2}}([ .-])[0-9]{{3}}\1[0-9]{{4}}        # North America
      | (?:1[ .-])?\([2-9][0-9]{{2}}\)[ ]?[0-9]{{3}}[ .-][0-9]{{4}}
      | 1[3-9][0-9]([ -])[0-9]{{4}}\2[0-9]{{4}}                       # China, mobile
      | 0[0-9]{{1,4}}([ ./-])[0-9]{{2,9}}(?:([ .-])[0-9]{{2,9}}(?:\4[0-9]{{2,9}}){{0,3}})?
      | \((?!19|20)[0-9]{{2,5}}\)[ ]?[0-9]{{2,9}}(?:[ -][0-9]{{2,9}}){{0,3}}
    ){_AFTER}""",
    re.VERBOSE,
)


def _provider(match: re.Match[str]) -> str:
    """Every key has digits; CSS classes that begin with ``sk-`` have none."""
    return "[key]" if any(map(str.isdigit, match[0])) else match[0]


def _bearer(match: re.Match[str]) -> str:
    scheme, space, token = match.groups()
    secret = len(token) >= 20 or any(map(str.isdigit, token))
    return f"{scheme}{space}[key]" if secret else match[0]


def _assigned(match: re.Match[str]) -> str:
    """A quoted text is a secret; a bare word is one unless it could be a name or prose."""
    name, quote, quoted, bare = match.groups()
    if quoted is not None:
        return f"{name}{quote}[key]"
    secret = not bare.startswith("$") and any(c in "0123456789!@#%^*+~?-" for c in bare)
    return f"{name}[key]" if secret else match[0]


def _card(match: re.Match[str]) -> str:
    from stdnum import luhn  # takes 100 ms, and only texts with such digits need it

    digits = re.sub("[^0-9]", "", match[0])
    return "[card]" if _ISSUERS.fullmatch(digits) and luhn.is_valid(digits) else match[0]


def _without_phones(text: str) -> str:
    parts = []
    done = start = 0
    while match := _PHONE.search(text, start):
        length = _phone_length(match[0])
        start = match.start() + length if length else match.end()
        if length:
            parts += [text[done : match.start()], "[phone]"]
            done = start
    return "".join([*parts, text[done:]])


def _phone_length(text: str) -> int:
    """Return how much of a text that looks like a phone number is one; 0 if it is none.

    An international number ends where its country's numbers do: more digits may follow it.
    """
    if re.fullmatch(r"[+(]?[0-9]+\.[0-9]+", text):  # a number with a fraction
        return 0
    if not text.startswith(("+", "00")):
        return len(text) if 9 <= sum(map(str.isdigit, text)) <= 15 else 0
    ends = [len(text), *(gap.start() for gap in reversed([*re.finditer("[^0-9+]+", text)]))]
    return next((end for end in ends if end > 7 and _is_possible(text[:end])), 0)


def _is_possible(text: str) -> bool:
    """Ask whether a number has a country's code, and a length that exists there."""
    import phonenumbers  # takes 60 ms, and only texts with such numbers need it

    try:
        number = phonenumbers.parse(re.sub("^00", "+", text), None)
    except phonenumbers.NumberParseException:
        return False
    return phonenumbers.is_possible_number(number)


_RULES = (
    _Rule(("-----begin ",), _PEM, "[key]"),
    _Rule(("://",), _USERINFO, "[key]"),
    _Rule(("bearer", "basic"), _BEARER, _bearer),
    _Rule(_NAMED, _ASSIGNED, _assigned),
    _Rule(_PREFIXES, _PROVIDER, _provider),
    _Rule(("@",), _EMAIL, "[email]"),
    _Rule(_DIGITS, _CARD, _card),
)
