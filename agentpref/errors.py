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
    │   ├── NotKept
    │   ├── ForgottenUser
    │   ├── RedactionFailed
    │   ├── ImplausibleClock
    │   └── LogClosed
    ├── ExchangeError               (ValueError)
    ├── ConfigError                 (ValueError)
    ├── MissingDependency           (ImportError)
    ├── ModelError
    │   ├── ModelNotFound           (FileNotFoundError)
    │   └── UnsupportedModel        (ValueError)
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
    └── ServingError
        ├── BackendClosed
        ├── EngineFailed
        ├── GenerationFailed
        ├── ServerUnreachable       (ConnectionError)
        └── SwapFailed
            └── ProbeFailed

A message names the offending value and ends with the cure. Foreign exceptions are chained, never
swallowed. This module knows nothing of the rest of the package.
"""

from __future__ import annotations


class AgentprefError(Exception):
    """Base of every error raised on purpose by agentpref."""


class HomeError(AgentprefError):
    """Something about a home folder or its database."""


class NotAHome(HomeError, FileNotFoundError):
    """The folder is not an agentpref home."""


class CorruptHome(HomeError):
    """The database of a home cannot be read as one."""


class NewerHome(HomeError):
    """The home was written by a newer agentpref, whose schema this one does not know."""


class RecordError(AgentprefError):
    """Something about what is being recorded."""


class InvalidMessage(RecordError, ValueError):
    """A message that cannot be stored: wrong shape, empty, not UTF-8, or too large."""


class InvalidFeedback(RecordError, ValueError):
    """A score, winner, key or source outside what is allowed."""


class UnknownRun(RecordError, LookupError):
    """Feedback names a run that this home has never seen."""


class NotKept(RecordError):
    """Feedback that could not be made durable (full disk, read-only home, locked database)."""


class ForgottenUser(RecordError):
    """What a user said before ``forget`` was asked for; it is not taken back in."""


class RedactionFailed(RecordError):
    """The host's ``redact`` raised, or gave something that is no text; nothing was stored."""


class ImplausibleClock(RecordError):
    """By the clock, more has expired than can be true; nothing was removed."""


class LogClosed(RecordError):
    """The log was closed before the call."""


class ExchangeError(AgentprefError, ValueError):
    """A line of an imported file that is not what its format promises."""


class ConfigError(AgentprefError, ValueError):
    """A setting that does not exist or is out of range."""


class MissingDependency(AgentprefError, ImportError):
    """An optional package is not installed; the message gives the pip command."""


class ModelError(AgentprefError):
    """Something about the base model."""


class ModelNotFound(ModelError, FileNotFoundError):
    """The model name resolves to nothing on this machine."""


class UnsupportedModel(ModelError, ValueError):
    """The model loads, but cannot be trained on (no chat template, no causal head)."""


class RevisionError(AgentprefError):
    """Something about a revision."""


class UnknownRevision(RevisionError, LookupError):
    """The registry has no such revision."""


class InvalidAdapter(RevisionError, ValueError):
    """An adapter that no engine should ever see; the message names the file or tensor."""


class WrongBase(RevisionError, ValueError):
    """An adapter that was trained on another base model, tokenizer or chat template."""


class GenerationConflict(RevisionError):
    """Another process changed what is live since it was read."""


class UpdateError(AgentprefError):
    """Something about an update."""


class UpdateRunning(UpdateError):
    """Another update holds this home."""


class UpdateInterrupted(UpdateError, KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended an update; ``signum`` says which. The next update resumes it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class UnusableState(UpdateError, ValueError):
    """What an interrupted update left is damaged, or not of this run; an update says so itself."""


class TrainingDiverged(UpdateError, ArithmeticError):
    """The loss is no longer a finite number."""


class ServingError(AgentprefError):
    """Something about serving."""


class BackendClosed(ServingError):
    """The serving backend was closed before the call."""


class EngineFailed(ServingError):
    """An engine's server did not start, or keeps dying; the message quotes its log."""


class GenerationFailed(ServingError):
    """The engine raised while generating; the backend stays usable."""


class ServerUnreachable(ServingError, ConnectionError):
    """No inference server answers, or the one that does is failing; it may be back in a moment."""


class SwapFailed(ServingError):
    """A revision could not be made live; the old one still serves."""


class ProbeFailed(SwapFailed):
    """A revision loads, but answers the probe with numbers that are not finite."""
