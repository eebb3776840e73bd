"""The manifest of a revision: what it consists of and where it came from.

A revision is named by its content, ``rev-<number>-<first 12 hex digits of the files' digest>``, so
that a name never means two adapters. The manifest is written canonically (sorted keys, UTF-8):
equal manifests are equal bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
FORMAT = 1

_REVISION_ID = re.compile(r"rev-\d{6,}-[0-9a-f]{12}")


def is_revision_id(name: str) -> bool:
    """Whether a name has the form of a revision's, and so is safe as a folder's name."""
    return _REVISION_ID.fullmatch(name) is not None


def revision_id(seq: int, files: Mapping[str, str]) -> str:
    """Name a revision by its number and the digests of its files (name → sha256)."""
    content = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return f"rev-{seq:06d}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def digest_file(file: Path) -> str:
    """Sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_adapter(folder: Path) -> dict[str, str]:
    """Sha256 of each file of an adapter, by name."""
    return {name: digest_file(folder / name) for name in ADAPTER_FILES}


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a manifest, which the folder and the database both contain."""
    options = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(dict(manifest), option=options)


def decode(data: bytes | str) -> dict[str, Any]:
    """Read a manifest back; keys that a newer version wrote are kept."""
    manifest: dict[str, Any] = orjson.loads(data)
    return manifest
