"""A Ray cluster of two nodes with one core each, on this machine, and the command beside it.

``make test-ray`` runs these in an environment of their own, which has Ray.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Of the processes that are started here, too: as on machines that nobody set up for tests.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

from ray.cluster_utils import Cluster

PREFERENCES = Path(__file__).parents[2] / "examples" / "preferences.jsonl"
ROWS = 80
SETTINGS = """
precision = "float32"  # two processes add up in another order, which bfloat16 shows
learning_rate = 5e-4
epochs = 8
[gate]
cross_fit_below = 0  # a team has no cross-fitting
confidence = 0.999999999999999  # too little evidence, which publishes
"""


def pytest_configure(config: pytest.Config) -> None:
    """Let Ray warn of old settings of its own, which it sets in this process."""
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray.data.context")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, so that two workers of a core each are on two."""
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.Popen[str]]:
    """Call ``command("update", …)`` to start it as a user would."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "agentpref_cli", *map(str, arguments)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def make_home(command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Call it for a home with the same preferences as any other."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("home")
        file = folder / "rows.jsonl"
        with PREFERENCES.open(encoding="utf-8") as lines:
            file.write_text("".join(next(lines) for _ in range(ROWS)), encoding="utf-8")
        (folder / "settings.toml").write_text(SETTINGS, encoding="utf-8")
        for words in (("init",), ("import", file)):
            with command(*words, "--home", folder / "home") as process:
                process.communicate()
            assert process.returncode == 0
        return folder / "home"

    return make


@pytest.fixture(scope="session")
def update(command, cluster: Cluster) -> Callable[..., subprocess.Popen[str]]:
    """Call ``update(home)`` to start an update of two workers; ``ray=False`` for one process."""

    def start(home: Path, *options: object, ray: bool = True) -> subprocess.Popen[str]:
        settings = ("--config", home.parent / "settings.toml", "--json")
        where = ("--ray", cluster.address, "--workers", 2) if ray else ()
        return command("update", "--home", home, "--model", "tiny", *settings, *where, *options)

    return start
