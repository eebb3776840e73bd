"""Every error that agentpref raises on purpose, as one tree.

    AgentprefError
    ├── HomeError
    │   ├── NotAHome                (FileNotFoundError)
    │   ├── CorruptHome
    │   └── NewerHome
    ├── RecordError
    │   ├── InvalidMessage          (ValueError)
    │   ├── InvalidFeedback         (ValueError)
    │   ├── UnknownRun              (LookupError)
    │   ├── UnknownUser             (LookupError)
    │   ├── UnknownNamespace        (LookupError)
    │   ├── RunExists
    │   ├── NotKept
    │   ├── ForgottenUser
    │   │   └── ForgottenRun        (UnknownRun)
    │   ├── RedactionFailed
    │   ├── ImplausibleClock
    │   └── LogClosed
    ├── ExchangeError               (ValueError)
    ├── ConfigError                 (ValueError)
    ├── MissingDependency           (ImportError)
    ├── ModelError
    │   ├── ModelNotFound           (FileNotFoundError)
    │   ├── UnsupportedModel        (ValueError)
    │   └── TemplateRefused         (ValueError)
    ├── RevisionError
    │   ├── UnknownRevision         (LookupError)
    │   ├── InvalidAdapter          (ValueError)
    │   ├── WrongBase               (ValueError)
    │   └── GenerationConflict
    ├── UpdateError
    │   ├── UpdateRunning
    │   ├── UpdateInterrupted       (KeyboardInterrupt)
    │   ├── UnusableState           (ValueError)
    │   └── TrainingDiverged        (ArithmeticError)
    ├── EvaluationError
    ├── JudgeError
    │   ├── NoVerdict               (ValueError)
    │   └── UncalibratedJudge
    └── ServingError
        ├── BackendClosed
        ├── EngineFailed
        ├── GenerationFailed
        ├── ServerUnreachable       (ConnectionError)
        └── SwapFailed
            └── ProbeFailed

A message names what is wrong and ends with the cure. Foreign exceptions are chained, never
swallowed, with one exception: nothing quotes what an app gives to be recorded, as a value or in a
chained error. Messages go to logs, and texts are redacted only on their way into the home. So
:func:`described` says the type and the length instead.
"""

from __future__ import annotations


def described(value: object) -> str:
    """Say what a value is, without the text in it; what holds none is shown.

    >>> described("ana@example.org"), described([1, 2]), described(-1)
    ('a str of 15 characters', 'a list of 2', '-1')
    """
    kind = type(value)
    if value is None or kind in (bool, int, float):
        return repr(value) if kind is not int or abs(value) < 1 << 64 else "a huge int"  # type: ignore[arg-type]
    if kind in (str, bytes, list, tuple, dict, set) and not value:
        return repr(value)
    if kind is str:
        return f"a str of {len(value):,} characters"  # type: ignore[arg-type]
    if kind in (bytes, list, tuple, dict, set):  # any other len() may be the app's code
        return f"a {kind.__name__} of {len(value):,}"  # type: ignore[arg-type]
    return f"{'an' if kind.__name__[0] in 'aeiouAEIO' else 'a'} {kind.__name__}"


def shown_id(value: object) -> str:
    """Quote an id if it has the form of one; a text that was given for one is only described."""
    is_id = isinstance(value, str) and len(value) <= 80 and not _NOT_IN_IDS & {*value}
    return repr(value) if is_id else described(value)


_NOT_IN_IDS = {*"@+ \t\n\r\"'<>()[]{}"}


class AgentprefError(Exception):
    """Base of every error that agentpref raises on purpose."""


class HomeError(AgentprefError):
    """A problem with a home folder or its database."""


class NotAHome(HomeError, FileNotFoundError):
    """The folder is not an agentpref home."""


class CorruptHome(HomeError):
    """The database of a home cannot be read."""


class NewerHome(HomeError):
    """A newer agentpref wrote the home, with a schema that this one does not know."""


class RecordError(AgentprefError):
    """A problem with what is recorded."""


class InvalidMessage(RecordError, ValueError):
    """A message that cannot be stored: wrong shape, empty, not UTF-8, or too large."""


class InvalidFeedback(RecordError, ValueError):
    """A score, winner, key or source outside of the allowed values."""


class UnknownRun(RecordError, LookupError):
    """Feedback names a run that is not in this home."""


class UnknownUser(RecordError, LookupError):
    """Nobody of this id is in this home, and nobody of it was forgotten."""


class UnknownNamespace(RecordError, LookupError):
    """Nothing of this namespace is in this home; the message lists those that are."""


class RunExists(RecordError):
    """Another run has the id of this one; feedback on the id belongs to the first."""


class NotKept(RecordError):
    """Feedback that could not be made durable: full disk, read-only home, or locked database."""


class ForgottenUser(RecordError):
    """An entry of a user who was forgotten after it was logged; it is not stored again."""


class ForgottenRun(ForgottenUser, UnknownRun):
    """A judgement names a run that was removed when it, or its user, was forgotten."""


class RedactionFailed(RecordError):
    """The host's ``redact`` raised, or did not return text; nothing was stored."""


class ImplausibleClock(RecordError):
    """By the clock, more has expired than is plausible; nothing was removed."""


class LogClosed(RecordError):
    """The log was closed before the call."""


class ExchangeError(AgentprefError, ValueError):
    """A line of an imported file that does not have its format."""


class ConfigError(AgentprefError, ValueError):
    """A setting that does not exist or is out of range."""


class MissingDependency(AgentprefError, ImportError):
    """An optional package is not installed; the message gives the pip command."""


class ModelError(AgentprefError):
    """A problem with the base model."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No model has the name, here or on the hub."""


class UnsupportedModel(ModelError, ValueError):
    """The model cannot be loaded or trained: no chat template, no causal head, damaged files."""


class TemplateRefused(ModelError, ValueError):
    """The chat template does not render a conversation, or not all of it."""


class RevisionError(AgentprefError):
    """A problem with a revision."""


class UnknownRevision(RevisionError, LookupError):
    """The registry has no such revision."""


class InvalidAdapter(RevisionError, ValueError):
    """An adapter that no engine should load; the message names the file or tensor."""


class WrongBase(RevisionError, ValueError):
    """An adapter that was trained on another base model, tokenizer or chat template."""


class GenerationConflict(RevisionError):
    """Another process changed the live revision since it was read."""


class UpdateError(AgentprefError):
    """A problem with an update."""


class UpdateRunning(UpdateError):
    """Another update has locked this home."""


class UpdateInterrupted(UpdateError, KeyboardInterrupt):
    """The signal ``signum`` (Ctrl-C or SIGTERM) ended an update; the next update resumes it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class UnusableState(UpdateError, ValueError):
    """The state of an interrupted update is damaged, or of another run; updates report it."""


class TrainingDiverged(UpdateError, ArithmeticError):
    """The loss is no longer a finite number."""


class EvaluationError(AgentprefError):
    """An evaluation has nothing to score, or nothing to compare."""


class JudgeError(AgentprefError):
    """A problem with a judge: its rubric, its engine, or what it says."""


class NoVerdict(JudgeError, ValueError):
    """A judge has no verdict on one question: it says nothing that is one, or refuses the question.

    ``why`` says which, in a few words; the tokens are what it took.
    """

    def __init__(
        self,
        message: str,
        *,
        why: str = "no verdict",
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        super().__init__(message)
        self.why, self.prompt_tokens, self.completion_tokens = why, prompt_tokens, completion_tokens


class UncalibratedJudge(JudgeError):
    """Nobody knows how right a judge is, or it is no better than chance."""


class RewardError(AgentprefError):
    """A reward model cannot be fitted, is not there, or cannot score."""


class ServingError(AgentprefError):
    """A problem with serving."""


class BackendClosed(ServingError):
    """The serving backend was closed before the call."""


class EngineFailed(ServingError):
    """An engine's server did not start, or ends again and again; the message quotes its log."""


class GenerationFailed(ServingError):
    """The engine raised while it generated; the backend stays usable."""


class ServerUnreachable(ServingError, ConnectionError):
    """No inference server answers, or the one that does fails; a retry may help."""


class SwapFailed(ServingError):
    """A revision could not be made live; the old one still serves."""


class ProbeFailed(SwapFailed):
    """A revision loads, but answers the probe with numbers that are not finite."""
