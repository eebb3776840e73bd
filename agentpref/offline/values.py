"""What answers are worth by the critic that an update was made with: for the best of several.

The candidate is trained to say what a method found to be best; where it draws several answers, Q of
that method also says which of these is worth most. So an answer that is rare, and leads on, is
chosen more often than the adapter alone would write it. Q is kept in the home beside the reward
models, is deleted with them by a removal, and never reaches the engine that serves.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentpref.errors import RewardError, WrongBase
from agentpref.home import Home
from agentpref.learn.kept_arrays import keep_arrays, read_arrays
from agentpref.offline.critics import Basis
from agentpref.serve.backend import GenerationRequest, Reply
from agentpref.serve.decisions import digests_of
from agentpref.serve.registry import Registry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from agentpref.learn.answer_reader import AnswerReader
    from agentpref.learn.features import Features
    from agentpref.models.base import BaseModel

_BASIS = ("mean", "size", "landmarks", "width", "mix")


@dataclass(frozen=True)
class ValueModel:
    """Q of one update: the worth of what a conversation comes to after an answer, discounted."""

    path: Path
    basis: Basis
    theta: NDArray[Any]
    reader: AnswerReader

    def rank(self, request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        """What each reply is worth; −∞ for one that cannot be read under the base.

        Raises:
            RewardError: none of them can be read.
        """
        return self.reader.rank(
            request.messages, [one.message for one in replies], request.tools, self._values
        )

    def _values(self, features: Features) -> list[float]:
        found: list[float] = (self.basis(features.answers) @ self.theta).tolist()
        return found


class ValueFollower:
    """Ranks the replies of each revision by Q of the update that made it, or its last ancestor's.

    >>> backend = BestOf(backend, ValueFollower(home).rank)      # doctest: +SKIP

    Args:
        home: the home.
        namespace: whose revisions.
        model: where their base is; by default the name that they were trained with.
    """

    def __init__(
        self,
        home: Home | str | Path | None,
        *,
        namespace: str = "default",
        model: str | None = None,
    ) -> None:
        self._home, self._namespace, self._model = Home.open(home), namespace, model
        self._registry = Registry(self._home, namespace=namespace)
        self._opened: ValueModel | None = None
        self._found: dict[tuple[str | Path, ...], Path] = {}
        self._lock = threading.Lock()

    def rank(self, request: GenerationRequest, replies: Sequence[Reply]) -> list[float]:
        """As :meth:`ValueModel.rank`.

        Raises:
            RewardError: nothing is kept for the revision, or no reply can be read.
            WrongBase: the base is another one than the update's.
        """
        if not replies:
            return []
        path = self._path_of(replies[0].revision)
        with self._lock:
            if self._opened is None or self._opened.path != path:
                self._opened = _open(path, self._model)
            opened = self._opened
        return opened.rank(request, replies)

    def _path_of(self, revision: str) -> Path:
        kept = _kept(self._home, self._namespace)
        paths: tuple[str | Path, ...] = (revision, *kept)
        with self._lock:
            if paths not in self._found:
                self._found = {paths: self._nearest(revision, kept)}
            return self._found[paths]

    def _nearest(self, revision: str, paths: Sequence[Path]) -> Path:
        """The file of the revision, or of its last ancestor that has one."""
        kept = {_revision_of(one): one for one in paths}
        published, name = {one.revision_id: one for one in self._registry.list()}, revision
        while name in published:
            if name in kept:
                return kept[name]
            name = published[name].parent or ""
        raise RewardError(
            f"nothing says what answers of {revision} are worth: neither it nor an ancestor was "
            "made by `agentpref update --method` with iql, cql, bcq, combo or airl; or it was "
            "pruned, or a removal deleted this"
        )


def keep(
    home: Home, namespace: str, revision: str, basis: Basis, theta: NDArray[Any], base: BaseModel
) -> Path:
    """Keep Q of the update that made a revision; what is there of pruned revisions goes."""
    import numpy as np

    arrays = {name: np.atleast_1d(getattr(basis, name)) for name in _BASIS} | {"theta": theta}
    about = {"base": base.identity, "precision": base.precision}
    path = keep_arrays(
        home,
        namespace,
        f"value-{revision}",
        {name: np.ascontiguousarray(one) for name, one in arrays.items()},
        about,
    )
    published = Registry(home, namespace=namespace).list()
    pruned = {one.revision_id for one in published if one.pruned_at is not None}
    for old in _kept(home, namespace):
        if _revision_of(old) in pruned:
            old.unlink(missing_ok=True)
    return path


def _kept(home: Home, namespace: str) -> list[Path]:
    """The files of a namespace, by their revisions' numbers."""
    return sorted(home.rewards_of(namespace).glob("value-*.safetensors"))


def _revision_of(path: Path) -> str:
    return path.stem.removeprefix("value-").rpartition("-")[0]


def _open(path: Path, model: str | None) -> ValueModel:
    from agentpref.learn.answer_reader import AnswerReader
    from agentpref.models.base import load_base

    _, arrays, about = read_arrays(path)
    base = load_base(
        model or about["base"]["name"],
        precision=about["precision"],
        chat_template_kwargs=about["base"].get("chat_template_kwargs", {}),
    )
    if digests_of(about["base"]) != digests_of(base.identity):
        raise WrongBase(
            f"{path.name} was made on {about['base']['name']!r}, whose weights or chat template "
            f"are not those of {base.name!r}; name its base"
        )
    basis = {name: arrays[name] for name in _BASIS} | {"width": arrays["width"].item()}
    return ValueModel(path, Basis(**basis), arrays["theta"], AnswerReader(base))
