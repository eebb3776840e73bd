"""A CronJob of Kubernetes, in an image that has agentpref, with the home on a volume.

Paths are those of the container. Texts are written as JSON strings, which YAML reads as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import orjson

from agentpref_cli.schedules import DELAY_MINUTES, GOOD_CODES, Job, Plan, Step, local_zone

_MADE_UP_SECONDS = 6 * 3_600
_GRACE_SECONDS = 300
_SCRIPT = """\
sleep "$(($(od -An -N2 -tu2 /dev/urandom) % {delay}))"
"$@" &
update=$!
trap 'kill -TERM "$update"' TERM
wait "$update"
code=$?
while kill -0 "$update" 2>/dev/null; do
    wait "$update"
    code=$?
done
case $code in {good}) exit 0 ;; esac
exit "$code"
"""


def plan(job: Job) -> Plan:
    """The manifest, which kubectl applies from its standard input."""
    zone = job.at.zone or local_zone()
    manifest = "\n".join(_manifest(job, zone)) + "\n"
    return Plan(
        files={},
        manifest=manifest,
        install=[Step(["kubectl", "apply", "-f", "-"], lambda: manifest)],
        remove=[Step(["kubectl", "delete", "cronjob", job.name])],
        hints=[
            f"every night at {job.at}, {zone}, or up to {DELAY_MINUTES} minutes later",
            f"try it once: kubectl create job --from=cronjob/{job.name} {job.name}-try",
            f"its log: kubectl logs job/{job.name}-try",
            "a token for the model hub belongs in a Secret: kubectl set env cronjob/"
            f"{job.name} --from=secret/NAME",
        ],
    )


def _manifest(job: Job, zone: str) -> Iterator[str]:
    script = _SCRIPT.format(delay=60 * DELAY_MINUTES, good=" | ".join(map(str, GOOD_CODES)))
    yield job.mark
    yield "apiVersion: batch/v1"
    yield "kind: CronJob"
    yield "metadata:"
    yield f"  name: {job.name}"
    yield "spec:"
    yield f"  schedule: {_text(f'{job.at.minute} {job.at.hour} * * *')}"
    yield f"  timeZone: {_text(zone)}"
    yield "  concurrencyPolicy: Forbid # the home has a lock, too"
    yield f"  startingDeadlineSeconds: {_MADE_UP_SECONDS} # so late a missed night is made up for"
    yield "  jobTemplate:"
    yield "    spec:"
    yield "      backoffLimit: 0 # the next night resumes what was interrupted"
    yield "      template:"
    yield "        spec:"
    yield "          restartPolicy: Never"
    yield f"          terminationGracePeriodSeconds: {_GRACE_SECONDS} # the step in hand"
    yield "          containers:"
    yield "            - name: update"
    yield f"              image: {_text(job.image)}"
    yield "              # Exit codes of good nights become 0. Kubernetes reads $$ as $."
    yield "              command:"
    yield from _items(["/bin/sh", "-c", script, "sh", *job.words])
    if job.environment:
        yield "              env:"
        for name, value in job.environment.items():
            yield f"                - name: {name}"
            yield f"                  value: {_text(_literal(value))}"
    yield "              volumeMounts:"
    yield "                - name: home"
    yield f"                  mountPath: {_text(str(job.home))}"
    yield "          volumes:"
    yield "            - name: home"
    yield "              persistentVolumeClaim:"
    yield f"                claimName: {_text(job.claim)}"


def _items(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if "\n" not in word:
            yield f"                - {_text(_literal(word))}"
            continue
        yield "                - |"
        for line in _literal(word).splitlines():
            yield f"                  {line}"


def _literal(text: str) -> str:
    """A text in which Kubernetes finds no variable."""
    return text.replace("$", "$$")


def _text(text: str) -> str:
    return orjson.dumps(text).decode()
