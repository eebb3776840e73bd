"""
title: agentpref feedback
author: agentpref
description: Sends every rating to agentpref, which trains on it. A deleted rating is taken back.
version: 1.0.0
license: Apache-2.0
required_open_webui_version: 0.12.0
"""

# Paste this into Open WebUI: Admin Panel -> Functions -> New Function. Open WebUI sees by the class
# `Event` that it is to be called with events. Then set its valves (the cogwheel) and enable it.
#
# It runs inside Open WebUI, so it reads the rating there, and no API key is needed.

import asyncio
import logging
from typing import Any

import httpx
from open_webui.models.feedbacks import Feedbacks
from pydantic import BaseModel, Field

log = logging.getLogger(__name__)

PAUSES = (1, 5, 25, 125)
"""Seconds between the tries, while the receiver does not answer."""


class Event:
    """Called with every event of Open WebUI; those of ratings go to agentpref."""

    class Valves(BaseModel):
        """The settings of this function."""

        receiver: str = Field(
            default="http://localhost:8400/feedback",
            description="Where agentpref takes ratings: the address of receiver() and /feedback.",
        )
        token: str = Field(default="", description="The token that receiver() was given.")

    def __init__(self) -> None:
        self.valves = self.Valves()

    async def event(self, event: dict[str, Any]) -> None:
        """Send an event of a rating, with the rating as it is now."""
        name = event["event"]
        if not name.startswith("feedback."):
            return
        sent = {key: event[key] for key in ("event", "subject", "created_at")}
        if name == "feedback.deleted_all":
            remaining = await Feedbacks.get_all_feedback_ids()
            sent["remaining"] = [feedback.id for feedback in remaining]
        elif name != "feedback.deleted":
            feedback = await Feedbacks.get_feedback_by_id(event["subject"]["id"])
            if feedback is None:  # deleted since, of which an event of its own tells
                return
            sent["feedback"] = feedback.model_dump()
        await self.send(sent)

    async def send(self, sent: dict[str, Any]) -> None:
        """Send it until the receiver has it, or says that it is wrong."""
        why = ""
        for pause in (*PAUSES, None):
            try:
                async with httpx.AsyncClient(timeout=30) as client:
                    answer = await client.post(
                        self.valves.receiver,
                        json=sent,
                        headers={"Authorization": f"Bearer {self.valves.token}"},
                    )
                why = answer.text[:500]
                if answer.status_code < 500:
                    break
            except httpx.HTTPError as error:
                why = repr(error)
            if pause is not None:
                await asyncio.sleep(pause)
        else:
            log.error(
                "agentpref: %s did not take %s: %s", self.valves.receiver, sent["subject"], why
            )
            return
        if answer.is_error:
            log.error("agentpref: %s refuses %s: %s", self.valves.receiver, sent["subject"], why)
