"""The methods of a home that read it, for notebooks: what they are called and what they take.

Reading stands on everything else in the library, and a home on nothing. So what the methods do is
in :mod:`agentpref.reading`, which is imported when one of them is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from datetime import date, timedelta

    from agentpref.home import Home
    from agentpref.reading import Records
    from agentpref.serve.backend import Revision
    from agentpref.types import Answered, Comparison, Example, Feedback, Run, UpdateReport


class Reads:
    """Reads what a home holds, while others write and also where nothing can be written."""

    __slots__ = ()

    @property
    def _home(self) -> Home:
        return cast("Home", self)

    def namespaces(self) -> list[str]:
        """Name the namespaces in which something was logged, trained or published."""
        from agentpref import reading

        return reading.namespaces(self._home)

    def runs(
        self,
        namespace: str = "default",
        *,
        since: float | str | date | timedelta | None = None,
        thread: str | None = None,
        tag: str | None = None,
        limit: int | None = None,
    ) -> Records[Run]:
        """Read runs, oldest first.

        The arguments are those of all methods that read: they give
        :class:`~agentpref.reading.Records`, which can be iterated and made into tables.

        Args:
            namespace: whose records; :meth:`namespaces` names them.
            since: only records from this time on: POSIX seconds, a date, a datetime, ISO 8601 text,
                or a timedelta for an age. A time without a zone is local.
            thread: only runs of this conversation, or judgements on them.
            tag: only runs with this tag among theirs (``"untagged"``: with none), or judgements on
                them.
            limit: only so many of the newest.

        Raises:
            ConfigError: an argument has no meaning.
            UnknownNamespace: while reading, other namespaces are in the home, and this one is not.
            HomeError: while reading, the home cannot be read.
        """
        from agentpref import reading

        which = reading.selection(namespace, since, limit, thread=thread, tag=tag)
        return reading.read_runs(self._home, which)

    def feedback(
        self,
        namespace: str = "default",
        *,
        since: float | str | date | timedelta | None = None,
        thread: str | None = None,
        tag: str | None = None,
        limit: int | None = None,
    ) -> Records[Feedback]:
        """Read what was said of single runs, oldest first, as :meth:`runs` does."""
        from agentpref import reading

        which = reading.selection(namespace, since, limit, thread=thread, tag=tag)
        return reading.read_feedback(self._home, which)

    def comparisons(
        self,
        namespace: str = "default",
        *,
        since: float | str | date | timedelta | None = None,
        thread: str | None = None,
        tag: str | None = None,
        limit: int | None = None,
    ) -> Records[Comparison]:
        """Read comparisons, oldest first, as :meth:`runs` does, by the tags of ``run_a``."""
        from agentpref import reading

        which = reading.selection(namespace, since, limit, thread=thread, tag=tag)
        return reading.read_comparisons(self._home, which)

    def pairs(
        self,
        namespace: str = "default",
        *,
        since: float | str | date | timedelta | None = None,
        tag: str | None = None,
        limit: int | None = None,
        held_out: float | None = None,
    ) -> Records[Example]:
        """Read the pairs that an update would use, in the order in which they were last judged.

        The arguments are those of :meth:`runs`, and ``held_out``: the share of the prompts that is
        held out, by default that of the last update. A pair has one tag.
        """
        from agentpref import reading

        which = reading.selection(namespace, since, limit, tag=tag)
        return reading.read_pairs(self._home, which, held_out)

    def updates(
        self,
        namespace: str = "default",
        *,
        since: float | str | date | timedelta | None = None,
        limit: int | None = None,
    ) -> Records[UpdateReport]:
        """Read the reports of updates that had something to learn, as :meth:`runs` does.

        ``agentpref updates`` lists the others too: those that failed, or found nothing new.
        """
        from agentpref import reading

        return reading.read_updates(self._home, reading.selection(namespace, since, limit))

    def answers(self, update_id: str) -> list[Answered]:
        """Read what live and an update's candidate answered to some held-out prompts.

        They were chosen at random. The list is empty for an update that kept none; answers to
        prompts that were removed or forgotten since are gone.

        Raises:
            HomeError: the home cannot be read.
        """
        from agentpref import reading

        return reading.read_answers(self._home, update_id)

    def revisions(
        self,
        namespace: str = "default",
        *,
        since: float | str | date | timedelta | None = None,
        limit: int | None = None,
    ) -> Records[Revision]:
        """Read the published revisions, oldest first, as :meth:`runs` does."""
        from agentpref import reading

        return reading.read_revisions(self._home, reading.selection(namespace, since, limit))
