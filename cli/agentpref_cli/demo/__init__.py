"""``agentpref demo``: three nights of learning from real preferences, and the proof of them.

``nights`` says what is asked, ``app`` is the agent, ``people`` give feedback, ``arms`` compares
with training that protects nothing, ``story`` brings them together, and ``screen`` prints.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path


def run(*, home: Path | None, json: bool, seed: int) -> None:
    """Tell the story in ``home``, or in a folder that is removed afterwards, and print it."""
    from agentpref_cli.demo import screen, story
    from agentpref_cli.terminal import print_result, progress

    with ExitStack() as stack:
        folder = home or Path(stack.enter_context(tempfile.TemporaryDirectory()), "home")
        report = stack.enter_context(progress(json))
        narrator = story.Narrator(progress=report or (lambda stage, done, total: None))
        if not json:
            screen.open_story()
            narrator.night = screen.show_night
        told = story.tell(folder, seed, narrator)
    print_result(json, told.to_mapping(), lambda: screen.close_story(told))
