"""Assistant-style dialogues, written by a small grammar: the same request in several styles.

Every request can be answered in five styles, and the corpus answers it in each of them with equal
probability. So the bundled model has habits in all directions and no preference among them, and a
preference that is trained into it shows in what it says.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.tiny_model import words

STYLES = ("plain", "polite", "verbose", "verbose_polite", "tool_call")


@dataclass(frozen=True)
class Request:
    """A user's wish: what was said, and the answer in a short and in a long form."""

    text: str
    short: str
    long: str
    tool: str
    arguments: dict[str, str]


def reminder(rng: random.Random) -> Request:
    """Be reminded of a call."""
    who, day, time = rng.choice(words.PEOPLE), rng.choice(words.DAYS), rng.choice(words.TIMES)
    ask = rng.choice(
        ["Remind me to call {0} on {1} at {2}.", "On {1} at {2} I have to call {0}, remind me."]
    )
    return Request(
        ask.format(who, day, time),
        f"Reminder set: call {who}, {day}, {time}.",
        f"I have set a reminder for you to call {who} on {day} at {time}, and it will ring a "
        "few minutes before.",
        "set_reminder",
        {"person": who, "day": day, "time": time},
    )


def message(rng: random.Random) -> Request:
    """Have a message sent."""
    who, topic = rng.choice(words.PEOPLE), rng.choice(words.TOPICS)
    ask = rng.choice(
        ["Send {0} a message about {1}.", "Write to {0} about {1}.", "Tell {0} about {1}."]
    )
    return Request(
        ask.format(who, topic),
        f"Sent to {who}: {topic}.",
        f"I have written a message to {who} about {topic} and sent it, so that you need not "
        "think of it again.",
        "send_message",
        {"person": who, "topic": topic},
    )


def table(rng: random.Random) -> Request:
    """Have a table booked."""
    place, size, day = rng.choice(words.PLACES), rng.choice(words.SIZES), rng.choice(words.DAYS)
    ask = rng.choice(
        ["Book a table for {1} at {0} on {2}.", "Get us a table at {0} on {2}, we are {1}."]
    )
    return Request(
        ask.format(place, size, day),
        f"Booked: {place}, {day}, {size} people.",
        f"I have booked a table for {size} people at {place} on {day}, and they will keep it "
        "for a quarter of an hour.",
        "book_table",
        {"place": place, "size": size, "day": day},
    )


def weather(rng: random.Random) -> Request:
    """Hear what the weather will be."""
    city, day = rng.choice(words.CITIES), rng.choice(words.DAYS)
    sky = rng.choice(words.SKIES)
    ask = rng.choice(
        ["What is the weather in {0} on {1}?", "How will the weather be in {0} on {1}?"]
    )
    return Request(
        ask.format(city, day),
        f"{city}, {day}: {sky}.",
        f"The weather in {city} on {day} will be {sky} for most of the day, so please dress "
        "for it when you go out.",
        "get_weather",
        {"city": city, "day": day},
    )


def timer(rng: random.Random) -> Request:
    """Have a timer started."""
    minutes, item = rng.choice(words.MINUTES), rng.choice(words.ITEMS)
    ask = rng.choice(["Set a timer of {0} minutes for the {1}.", "Start {0} minutes for the {1}."])
    return Request(
        ask.format(minutes, item),
        f"Timer: {minutes} minutes, {item}.",
        f"I have started a timer of {minutes} minutes for the {item}, and I will tell you "
        "when the time is up.",
        "set_timer",
        {"minutes": minutes, "label": item},
    )


def shopping(rng: random.Random) -> Request:
    """Have an item put on a list."""
    item, name = rng.choice(words.ITEMS), rng.choice(words.LISTS)
    ask = rng.choice(
        ["Add {0} to the {1} list.", "Put {0} on the {1} list.", "We need {0} on the {1} list."]
    )
    return Request(
        ask.format(item, name),
        f"Added {item} to the {name} list.",
        f"I have added {item} to the {name} list for you, and you will find it there the next "
        "time you open it.",
        "add_item",
        {"item": item, "list": name},
    )


def device(rng: random.Random) -> Request:
    """Have a device turned on or off."""
    thing, room, way = rng.choice(words.DEVICES), rng.choice(words.ROOMS), rng.choice(["on", "off"])
    ask = rng.choice(["Turn {2} the {0} in the {1}.", "Switch the {0} in the {1} {2}."])
    return Request(
        ask.format(thing, room, way),
        f"The {thing} is {way}.",
        f"I have turned {way} the {thing} in the {room}, and I will leave it so until you "
        "tell me to change it.",
        "switch_device",
        {"device": thing, "room": room, "state": way},
    )


def music(rng: random.Random) -> Request:
    """Hear music in a room."""
    kind, room, minutes = (
        rng.choice(words.MUSIC),
        rng.choice(words.ROOMS),
        rng.choice(words.MINUTES),
    )
    ask = rng.choice(
        ["Play {0} in the {1} for {2} minutes.", "I want {2} minutes of {0} in the {1}."]
    )
    return Request(
        ask.format(kind, room, minutes),
        f"Playing {kind}, {room}, {minutes} minutes.",
        f"I am now playing {kind} in the {room} and will stop after {minutes} minutes, unless "
        "you ask for more of it.",
        "play_music",
        {"kind": kind, "room": room, "minutes": minutes},
    )


KINDS: tuple[Callable[[random.Random], Request], ...] = (
    reminder, message, table, weather, timer, shopping, device, music,
)  # fmt: skip


def draw_request(rng: random.Random) -> Request:
    """Draw one request, all kinds alike."""
    return rng.choice(KINDS)(rng)


def answer(request: Request, style: str) -> str:
    """Answer a request in one of :data:`STYLES`."""
    forms = {
        "plain": request.short,
        "polite": f"Certainly! {request.short} Thank you.",
        "verbose": request.long,
        "verbose_polite": f"Certainly! {request.long} Thank you.",
        "tool_call": call_text(request),
    }
    return forms[style]


def call_text(request: Request) -> str:
    """The request as a tool call in the Hermes form that the chat template renders."""
    body = json.dumps({"name": request.tool, "arguments": request.arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


def tool_schema(request: Request) -> dict[str, object]:
    """The OpenAI schema of the tool that would serve a request."""
    properties = {name: {"type": "string"} for name in request.arguments}
    return {
        "type": "function",
        "function": {
            "name": request.tool,
            "parameters": {"type": "object", "properties": properties},
        },
    }
