"""An adapter's files are read once: what is used is what was read, whatever becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentpref.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from agentpref.testing import write_adapter


@pytest.mark.parametrize("when", ["before the tensors are made", "after"])
def test_tensors_and_settings_are_those_that_were_read_when_the_files_change_later(
    tmp_path: Path, when: str
) -> None:
    folder = write_adapter(tmp_path / "adapter", seed=1)
    files = read_adapter(folder)
    expected = {name: tensor.clone() for name, tensor in read_adapter(folder).tensors().items()}
    digests, settings = files.digests, files.settings()
    tensors = files.tensors() if when == "after" else {}
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        size = (folder / name).stat().st_size
        with (folder / name).open("r+b") as stream:
            stream.write(bytes(size))
            stream.flush()
            stream.truncate(1)
    tensors = tensors or files.tensors()
    assert tensors.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in tensors.items())
    assert (files.digests, files.settings()) == (digests, settings)
