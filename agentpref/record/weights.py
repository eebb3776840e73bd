"""Which revisions have the same weights, whatever their files look like.

A file of safetensors may be written anew with other metadata or in another order, and be another
file of the same weights. So weights are compared by a digest of the tensors: their names, types,
shapes and bytes. Manifests have it as ``tensors``. For a revision of an older version it is read
from its file, if that is there. Weights that were changed, were it by a factor that another
setting takes back, are others.
"""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import orjson

from agentpref.home import Home, reading

_FILE = "adapter_model.safetensors"


def tensor_digest(data: bytes) -> str:
    """Digest the tensors of a safetensors file, given its bytes.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        tensors = orjson.loads(data[8:start])
        digest = hashlib.sha256()
        for name in sorted(tensors.keys() - {"__metadata__"}):
            about = tensors[name]
            begin, end = about["data_offsets"]
            digest.update(orjson.dumps([name, about["dtype"], about["shape"], end - begin]))
            digest.update(memoryview(data)[start + begin : start + end])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a safetensors file ({error})") from error
    return digest.hexdigest()


def name_weights(connection: sqlite3.Connection, home: Home, *, of: str = "true") -> None:
    """Give a connection the SQL function ``weights(revision_id)``, equal for equal weights.

    It is null for what has no manifest, and for revisions for which the SQL condition ``of`` does
    not hold. Weights with instructions beside them are others: what these were made of says nothing
    of the weights.
    """
    query = f"SELECT revision_id, manifest FROM revision WHERE {of}"
    files, tensors = dict[str, str](), dict[str, str]()  # the digests of both
    told = dict[str, str]()
    for name, manifest in connection.execute(query):
        published, digest = _digests(manifest)
        if published is not None:
            files[name], told[name] = published, _instructions(manifest)
            digest = digest or _read(home.adapters / name / _FILE, published)
            if digest is not None:
                tensors[published] = digest
    # Of a file that is gone, another revision may have had a copy.
    named = {name: tensors.get(file, file) + told[name] for name, file in files.items()}
    connection.create_function("weights", 1, named.get, deterministic=True)


def _digests(manifest: Any) -> tuple[str | None, str | None]:
    """The digests of the file and of its tensors in a manifest, which may be damaged."""
    try:
        content = orjson.loads(manifest)
        found = content["files"][_FILE], content.get("tensors")
    except (KeyError, TypeError, ValueError):
        return None, None
    file, tensors = (digest if isinstance(digest, str) else None for digest in found)
    return file, tensors


def _instructions(manifest: Any) -> str:
    """What tells a revision with instructions from the one whose weights it has."""
    try:
        text = orjson.loads(manifest).get("instructions")
    except (AttributeError, TypeError, ValueError):
        return ""
    return f"+{hashlib.sha256(text.encode()).hexdigest()}" if isinstance(text, str) and text else ""


def _read(file: Path, published: str) -> str | None:
    """The digest of a file's tensors; None if it is not there as it was published."""
    try:
        with reading(file) as stream:
            data = stream.read()
        return tensor_digest(data) if hashlib.sha256(data).hexdigest() == published else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
