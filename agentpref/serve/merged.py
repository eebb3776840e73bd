"""Exports of revisions that are merged into their base, for tools that load no LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from agentpref.errors import ModelNotFound
from agentpref.home import Home, StrPath
from agentpref.models import merging
from agentpref.serve import folders
from agentpref.serve.registry import Registry
from agentpref.serve.validate import check_published, check_revision
from agentpref.types import Progress


class Merged(NamedTuple):
    """A folder with a whole model, the number format of its weights, and its size in bytes."""

    path: Path
    dtype: str
    bytes: int


def export_merged(
    registry: Registry,
    revision_id: str,
    folder: StrPath,
    *,
    model: str | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write a revision, merged into its base, as a model that plain transformers loads.

    The folder gets its name once all of it is on the disk. It also has the revision's manifest.

    Args:
        registry: the revisions of a namespace.
        revision_id: which of them.
        folder: a folder that is missing or empty, outside of the home.
        model: where the base is, if it is no longer where it was trained: a folder or a hub's name.
        progress: is told how far it is.

    Raises:
        UnknownRevision: this namespace has none of that id.
        RevisionError: it is tainted, in quarantine, or was pruned.
        InvalidAdapter: its files are not those that were published, or do not fit the base.
        WrongBase: the model is not the one that it was trained on.
        ModelError: the base cannot be found or loaded, or is quantized.
        MissingDependency: torch or transformers is not installed.
        ConfigError: the folder is in the home, a file, or not empty.
        NotKept: the folder cannot be written.
    """

    def tell(stage: str, done: int) -> None:
        if progress is not None:
            progress(stage, done, 1)

    revision = registry.get(revision_id)
    registry.require_fit(revision)
    check_published(revision)  # before minutes of loading
    trained_on = revision.manifest["base"]
    with folders.exporting(folder) as draft:
        tell("reading the base", 0)
        arguments = trained_on.get("chat_template_kwargs")
        try:
            base = merging.load_stored(model or trained_on["name"], arguments)
        except ModelNotFound as error:
            if model is not None:
                raise
            raise ModelNotFound(
                f"the base of {revision_id} is not where it was trained: {error}; or say where it "
                f"is now, with --model"
            ) from error
        layers = merging.linear_layers(base)
        files = check_revision(revision, base=base.identity, layers=layers)
        tell("reading the base", 1)
        merging.merge(base, files, progress)
        tell("writing the model", 0)
        merging.write_model(base, draft)
        (draft / folders.MANIFEST_FILE).write_bytes(folders.encode(revision.manifest))
        registry.require_fit(revision)  # somebody may have been forgotten meanwhile
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        dtype = str(base.model.dtype).removeprefix("torch.")
    tell("writing the model", 1)
    return Merged(Home.resolve(folder), dtype, size)
