"""A folder with an adapter that was trained elsewhere: what is read of it, ignored and refused.

Two files are read, each once, and the folder is never changed. What other programs leave beside
them is ignored, and said: a pickle of the same weights, and TRL's ``ref``, which is a copy of the
adapter that its training started from.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentpref.errors import ConfigError, InvalidAdapter, RevisionError
from agentpref.home import Home
from agentpref.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, readable
from agentpref.record.weights import name_weights, tensor_digest
from agentpref.serve.tensors import Shape
from agentpref.serve.validate import check_adapter, check_bytes

PICKLE = "adapter_model.bin"
"""What older versions of peft save weights to. Loading it may run any code; nothing here does."""

REFERENCE = "ref"
"""The folder in which TRL saves the reference of its training."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """The checked bytes of an adapter, and notes on what was ignored beside it."""

    files: AdapterFiles
    notes: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, str]:
        """Its folder's name and the sha256 of its weights: what a revision keeps of its origin."""
        return {"folder": self.files.folder.name, "sha256": self.files.digests[WEIGHTS_FILE]}

    def require_base(self, name: str, layers: Mapping[str, Shape]) -> None:
        """Refuse an adapter that does not fit a base model; its layers and their shapes decide.

        Args:
            name: the base model's.
            layers: (out, in) of each layer that may be adapted, by module name.

        Raises:
            InvalidAdapter: naming the layer, and the base that its settings name.
        """
        try:
            check_bytes(self.files, layers=layers)
        except InvalidAdapter as error:
            hint = self.files.settings().get("base_model_name_or_path")
            named = f"its settings name {hint!r} as its base" if hint else "its settings name none"
            raise InvalidAdapter(
                f"{error}; it does not fit the language model of {name!r} ({named}): give the "
                "model that it was trained on, or train it on this one"
            ) from error

    def require_untainted(self, connection: sqlite3.Connection, home: Home) -> None:
        """Refuse the weights of a revision that learned from what was forgotten since.

        Raises:
            RevisionError: naming that revision.
        """
        name_weights(connection, home, of="tainted_at IS NOT NULL")
        found = connection.execute(
            "SELECT revision_id FROM revision WHERE tainted_at IS NOT NULL"
            " AND weights(revision_id) IN (?, ?) ORDER BY seq",
            (tensor_digest(self.files.weights), self.about["sha256"]),
        ).fetchone()
        if found is not None:
            raise RevisionError(
                f"{self.files.folder} has the weights of {found[0]}, which was trained on text "
                "that was forgotten since; train another one without it"
            )


def read_foreign(folder: str | Path, home: Home) -> Foreign:
    """Read and check an adapter that peft, or a program that uses it, saved outside of a home.

    Raises:
        ConfigError: the folder is in the home, whose revisions are promoted instead.
        InvalidAdapter: naming the file, the setting or the tensor that is wrong, and the cure.
        NotKept: a file cannot be read.
        MissingDependency: numpy is not installed.
    """
    path = Path(folder).expanduser()
    if path.resolve().is_relative_to(home.path.resolve()):
        raise ConfigError(
            f"{path} is in the home {home.path}; `agentpref adapters promote` makes a revision of "
            "this home live"
        )
    with readable(path):
        has = {name: (path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE)}
        has_reference = (path / REFERENCE / CONFIG_FILE).is_file()
    if has_reference and not has[CONFIG_FILE]:
        raise InvalidAdapter(
            f"{path} holds nothing but {REFERENCE}/, the adapter that TRL's training started from; "
            "give the folder that the trained adapter was saved to"
        )
    if has[PICKLE] and not has[WEIGHTS_FILE]:
        raise InvalidAdapter(
            f"{path / PICKLE} is a pickle, which may run any code and is never loaded; save the "
            "adapter with save_pretrained(folder, safe_serialization=True)"
        )
    files = check_adapter(path)
    ignored = [PICKLE] if has[PICKLE] else []
    ignored += [f"{REFERENCE}/ (what TRL's training started from)"] if has_reference else []
    note = f"ignored beside the adapter: {', '.join(ignored)}"
    return Foreign(files, (note,) if ignored else ())
