"""What `redact` replaces in a text, what it leaves, and which texts of a message are redacted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agentpref
from agentpref.errors import RecordError, RedactionFailed
from agentpref.record.ingest.redaction import redact, redacted, redacted_data

PEM = (
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEow==\n"
    "-----END RSA PRIVATE KEY-----"
)

TAKEN = {
    "email": [
        "ada@example.org",
        "Ada.Lovelace+notes@sub.example.co.uk",
        "büro@exämple.de",
        "x_1%y@a-b.example",
    ],
    "phone": [
        "+49 30 1234567",
        "+49 (30) 1234-567",
        "+1 (555) 123-4567",
        "+1-555-123-4567",
        "+1.555.123.4567",
        "+15551234567",
        "+44 (0)20 7946 0958",
        "+33 1 23 45 67 89",
        "+91 98765 43210",
        "0049 30 1234567",
        "(555) 123-4567",
        "(555)123-4567",
        "555-123-4567",
        "555.123.4567",
        "555 123 4567",
        "1-800-555-0199",
        "030 12345678",
        "(030) 12345678",
        "0171/1234567",
        "0171-123 45 67",
        "020 7946 0958",
        "01 23 45 67 89",
        "06-12345678",
        "090-1234-5678",
        "0412 345 678",
        "138 1234 5678",
        "(11) 91234-5678",
    ],
    "card": [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111111111111111",
        "4222222222222",
        "5555555555554444",
        "2223003122003222",
        "378282246310005",
        "3782 822463 10005",
        "6011111111111117",
        "3056 930902 5904",
        "3530111333300000",
        "6304000000000000",
    ],
    "key": [
        "sk-proj-abc123def456ghi789jkl",
        "sk-ant-api03-AbCdEf0123456789_-x",
        "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "github_pat_11ABCDEFG0abcdefghijklmnop",
        "glpat-abcdef1234567890abcd",
        "xoxb-123456789012-abcdefABCDEF",
        "AIzaSyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY",
        "hf_abcdefghijklmnopqrstuvwxyz0123456789",
        "SG.abcdefghijklmnop1234.abcdefghijklmnop1234",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0TH",
        PEM,
        PEM.replace("\n", "\\n"),
    ],
}

REWRITTEN = [
    ("Authorization: Bearer abc.def123", "Authorization: Bearer [key]"),
    ("Authorization: Basic YWRhOmh1bnRlcjI=", "Authorization: Basic [key]"),
    ("api_key=abcdef123456", "api_key=[key]"),
    ("apiKey: 'swordfish'", "apiKey: '[key]'"),
    ("password: hunter2", "password: [key]"),
    ("Password:hunter22 and more", "Password:[key] and more"),
    ("my password is hunter2.", "my password is [key]"),
    ('{"password": "swordfish", "n": 1}', '{"password": "[key]", "n": 1}'),
    (r"{\"password\": \"swordfish\"}", r"{\"password\": \"[key]\"}"),
    ("DB_PASSWORD=correct-horse-battery", "DB_PASSWORD=[key]"),
    ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", "aws_secret_access_key = [key]"),
    ("https://x.example/?token=abcdef123456&p=1", "https://x.example/?token=[key]&p=1"),
    ("postgres://ada:hunter2@db.example.org/x", "postgres://[key]@db.example.org/x"),
    ("4111-1111-1111-1111 12/26 123", "[card] 12/26 123"),
    ("Call 030 12345678 2 times", "Call [phone] 2 times"),
    ("Call +1 555 123 4567 2 times", "Call [phone] 2 times"),
    ("+1 555 123 4567 030 12345678 x", "[phone] [phone] x"),
    ("mail a@b.example, or b@c.example.", "mail [email], or [email]."),
    (f"-----BEGIN PRIVATE KEY-----\n{'A' * 64}\n{'B' * 40}\nbye", "[key]\nbye"),
    ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nx\n-----END PGP PRIVATE KEY BLOCK-----.", "[key]."),
]  # fmt: skip

LEFT = [
    "2024-01-02",
    "2024-01-02T03:04:05Z",
    "2024-01-02 03:04:05.678901",
    "01.02.2024 10:30",
    "05-06-2024 14:00",
    "Mon Feb 5 10:00:00 2024 +0200",
    "2024-01-02 03:04:05 +1000 2024-01-03",
    "00:00:12,345 --> 00:00:15,678",
    "0900-1700 0930-1800",
    "123e4567-e89b-12d3-a456-426614174000",
    "11111111-2222-3333-4444-555555555555",
    "0198c2a4-7d1e-7b3f-9c55-0a1b2c3d4e5f",
    "v10.15.7-rc.1",
    "192.168.1.100",
    "10.0.0.1:8080",
    "2001:db8::ff00:42:8329",
    "order 123-4567890-1234567",
    "ORD-20240102-000123",
    "978-3-16-148410-0",
    "SSN 123-45-6789",
    "12345678",
    "5551234567",
    "1700000000000",
    "1700000000000000000",
    "x = 9007199254740993",
    "1234567890123456",
    "4111111111111112",
    "0x4111111111111111",
    "4111111111111111n",
    "0.4111111111111111",
    "10 000 000",
    "1 234 567 890",
    "12,345,678.90",
    "+1.2345678e+00",
    "+15000000.25",
    "+40.7128, -74.0060",
    "+999 123 456 789",
    "+1 234 567",
    "3.14159265358979",
    "Nature 521 (2015) 436-444",
    "logo@2x.png",
    "lodash@4.17.21",
    "@decorator",
    "class sk-toggleable__label-arrow",
    "max_tokens=512",
    "next_token=abcdef",
    "tokenizer: LlamaTokenizer",
    "password = get_password()",
    "password: str",
    'api_key=os.environ["OPENAI_API_KEY"]',
    "password: ${PASSWORD}",
    "password=$DB_PASSWORD",
    "the password is required",
    "Password: must be at least eight characters",
    "bearer authentication",
    "monkey=banana123",
    "http://example.org:8080/a/b",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
]


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in TAKEN.items() for text in texts]
)
def test_an_email_phone_card_or_key_is_replaced_by_its_kind(kind: str, text: str) -> None:
    assert redact(text) == f"[{kind}]"
    assert redact(f"It is {text}, I think.") == f"It is [{kind}], I think."
    assert redact(f"({text})") == f"([{kind}])"


@pytest.mark.parametrize(("text", "safe"), REWRITTEN)
def test_the_text_around_a_match_stays(text: str, safe: str) -> None:
    assert redact(text) == safe


@pytest.mark.parametrize("text", LEFT)
def test_a_text_that_only_looks_like_personal_data_stays(text: str) -> None:
    assert redact(text) == text
    assert redact(f"so {text}; yes") == f"so {text}; yes"


PIECES = st.sampled_from(
    [text for texts in TAKEN.values() for text in texts]
    + [text for text, _ in REWRITTEN]
    + [*"abk019@.-_+()[]{}:/='\"\\ \n;,$", "[key]", "[phone]", "030", "4111", "1111", "+49", "sk-"]
    + ["password", "token", " is ", "Bearer ", "://", "x.example", "-----BEGIN PRIVATE KEY-----"]
)


@given(st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=60))
@settings(max_examples=600)
def test_redacting_twice_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


HOSTILE = [
    "a", "a.", "a@", "a@a.", "1", "0 ", "+1-", "+1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 ", "+999 1 ",
    "+49 30 1234567 ", "4111 ", "(555)", "0" * 13 + " ", "eyJ", "sk-", "eyJaaaaaaaa.",
    "SG.aaaaaaaaaaaaaaaaa.", "Bearer ", "password", "password:   ", 'password="', "token", "://a:",
    "-----BEGIN PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----\nAAAAAAAAAAAAAAAAAAAA\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_a_hostile_megabyte_is_redacted_in_linear_time(unit: str) -> None:
    """A rule that is quadratic would take minutes here."""
    assert redact(unit * (1_000_000 // len(unit)))


def test_redact_is_public() -> None:
    assert agentpref.redact is redact


def test_the_libraries_for_numbers_load_only_when_a_text_needs_them() -> None:
    script = """if True:
        import sys
        from agentpref import redact

        def loaded():
            return sorted({"phonenumbers", "stdnum"} & sys.modules.keys())

        redact("order 12345 of 2024-01-02")
        print(loaded())
        redact("+49 30 1234567, 4111 1111 1111 1111")
        print(loaded())
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    assert done.stdout == "[]\n['phonenumbers', 'stdnum']\n"


# Every text of a JSON-like value


def shout(text: str) -> str:
    return text.upper()


def test_texts_are_redacted_at_any_depth() -> None:
    value = {"a": ["x", {"b": ("y", 1, None, True, 2.5)}]}
    assert redacted(value, shout) == {"a": ["X", {"b": ("Y", 1, None, True, 2.5)}]}


def test_a_value_without_matches_is_returned_as_the_same_object() -> None:
    value = {"kept": ["x", {"y": "z"}], "changed": "ada@example.org"}
    safe = redacted(value, redact)
    assert safe["changed"] == "[email]"
    assert safe["kept"] is value["kept"]
    assert redacted(safe, redact) is safe
    assert value["changed"] == "ada@example.org", "what the host gave is left as it is"


def test_the_structure_of_a_message_stays() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "ada"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "search", "arguments": '{"q": "ada"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "search", "content": "found"},
    ]
    assert redacted(messages, shout) == [
        {"role": "user", "content": [{"type": "text", "text": "HELLO"}], "name": "ADA"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "search", "arguments": '{"Q": "ADA"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "search", "content": "FOUND"},
    ]


def test_the_structure_of_a_tool_stays() -> None:
    def tool(prose: Any) -> Any:
        properties = {"type": {"type": "string", "description": prose("kind of thing")}}
        return {
            "type": "function",
            "function": {
                "name": "search",
                "description": prose("finds things"),
                "parameters": {"type": "object", "properties": properties, "required": ["type"]},
            },
        }

    assert redacted(tool(str), shout) == tool(shout)


def test_a_name_in_metadata_is_redacted() -> None:
    metadata = {"name": "ada", "id": "a-1", "type": ["x"], "pattern": {"type": "x", "format": "y"}}
    assert redacted_data(metadata, shout) == {
        "name": "ADA",
        "id": "A-1",
        "type": ["X"],
        "pattern": {"type": "X", "format": "Y"},
    }


@pytest.mark.guarantee("privacy")
def test_no_key_of_the_apps_own_data_exempts_a_text_from_redaction() -> None:
    data = {
        "customer": {"role": "member", "id": "ada@example.org", "content": "x"},
        "call": {"name": "ada@example.org", "arguments": "x"},
        "type": "ada@example.org",
    }
    assert "ada" not in str(redacted_data(data, redact))
    call = {"name": "find", "arguments": {"who": {"role": "member", "id": "ada@example.org"}}}
    use = {"type": "tool_use", "id": "c", "name": "find", "input": {"type": "ada@example.org"}}
    message = {"role": "assistant", "content": [use], "tool_calls": [{"id": "c", "function": call}]}
    assert "ada" not in str(redacted([message], redact))
    schema = {"type": "object", "properties": {"who": {"default": {"type": "ada@example.org"}}}}
    assert "ada" not in str(redacted([{"function": {"parameters": schema}}], redact))


def test_a_mapping_with_a_role_is_a_message_only_if_it_says_something() -> None:
    assert redacted({"role": "member", "id": "ada@example.org"}, redact)["id"] == "[email]"


# Hosts' callables that fail


def test_a_redactor_that_raises_is_reported_without_the_text() -> None:
    def broken(text: str) -> str:
        raise KeyError(text)

    with pytest.raises(
        RedactionFailed, match=r"raised KeyError \(.*:\d+\) on a text of 6 ch"
    ) as caught:
        redacted({"content": "hidden"}, broken)
    assert isinstance(caught.value, RecordError)
    assert caught.value.__cause__ is caught.value.__context__ is None, "they would quote the text"
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("raised", [SystemExit, asyncio.CancelledError, GeneratorExit])
def test_a_redactor_may_raise_what_no_except_exception_catches(
    raised: type[BaseException],
) -> None:
    def broken(text: str) -> str:
        raise raised

    with pytest.raises(RedactionFailed, match=f"raised {raised.__name__}"):
        redacted(["hidden"], broken)


def test_a_redactor_that_halves_a_character_is_refused() -> None:
    with pytest.raises(RedactionFailed, match="half of a character"):
        redacted(["hidden"], lambda text: "\ud83d")


@pytest.mark.parametrize("given", [None, b"safe", 0])
def test_a_redactor_that_returns_no_text_is_refused(given: object) -> None:
    with pytest.raises(RedactionFailed, match=f"returned {type(given).__name__} .* return a str"):
        redacted(["secret"], lambda text: given)  # type: ignore[arg-type, return-value]
