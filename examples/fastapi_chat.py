"""A chat page of one's own, with thumbs that are learned from.

    pip install 'agentpref[fastapi,gateway,train]'
    uvicorn fastapi_chat:app --app-dir examples

Open http://127.0.0.1:8000, ask, and press a thumb; `agentpref stats` counts it. The home is
$AGENTPREF_HOME or ./.agentpref, the model $MODEL or the bundled one.
"""

from __future__ import annotations

import os
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse

import agentpref
from agentpref_adapters.fastapi import feedback_router
from agentpref_adapters.transformers import open_router

MODEL = os.environ.get("MODEL", "tiny")
PAGE = """<!doctype html><title>A chat</title>
<form id=ask><input id=question size=60 autofocus><button>Ask</button></form><div id=answers></div>
<script>
const json = async (path, body) => {
  const answer = await fetch(path, {method: "POST", body: JSON.stringify(body),
    headers: {"Content-Type": "application/json"}});
  if (!answer.ok) throw alert(`${path}: ${await answer.text()}`);
  return answer.json();
};
ask.onsubmit = async event => {
  event.preventDefault();
  const reply = await json("/ask", {question: question.value});
  const row = answers.appendChild(document.createElement("p"));
  row.append(reply.text + " ");
  for (const [sign, value] of [["👍", true], ["👎", false]]) {
    const thumb = row.appendChild(document.createElement("button"));
    thumb.textContent = sign;
    thumb.onclick = async () => {
      const taken = thumb.className === "given";
      await json("/feedback", {inference_id: reply.run, metric_name: "thumbs",
                               value: taken ? null : value});
      for (const other of row.querySelectorAll("button")) other.className = "";
      thumb.className = taken ? "" : "given";
    };
  }
};
</script><style>.given {outline: 2px solid}</style>"""

log = agentpref.Log()
chat = agentpref.Chat(log, open_router(log.home, MODEL), model=MODEL)
app = fastapi.FastAPI()
app.include_router(feedback_router(log))


@app.get("/", response_class=HTMLResponse)
def page() -> str:
    """The page."""
    return PAGE


@app.post("/ask")
def ask(body: dict[str, Any]) -> dict[str, str]:
    """Answer one question, and name the run for the thumbs."""
    reply = chat.reply([{"role": "user", "content": body["question"]}], max_tokens=64)
    return {"text": reply.text, "run": reply.run_id}
