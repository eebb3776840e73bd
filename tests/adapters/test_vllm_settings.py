"""How a vLLM server is found and started. tests/vllm_server starts a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from agentpref.errors import ConfigError, MissingDependency, ModelNotFound
from agentpref.models.base import find_base
from agentpref_adapters._vllm_process import VllmProcess, find_python, vllm_process


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A program that says it has vLLM."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    return python


@pytest.fixture
def prepare(python: Path, tmp_path: Path) -> Callable[..., VllmProcess]:
    """Prepare a server that the program would start."""

    def prepare(*extra: str, **settings: object) -> VllmProcess:
        return vllm_process("tiny", *extra, logs=tmp_path, python=str(python), **settings)

    return prepare


def test_the_command_line_names_the_base_and_the_limits_of_adapters(prepare) -> None:
    words = list(prepare(port=8123, max_loras=3).command)

    def value(option: str) -> str:
        return words[words.index(option) + 1]

    assert value("--model") == str(find_base("tiny"))
    assert value("--served-model-name") == "base"
    assert value("--host") == "127.0.0.1"
    assert value("--port") == "8123"
    assert value("--max-loras") == "3"
    assert value("--max-cpu-loras") == "3"
    assert value("--generation-config") == "vllm"
    assert "--enable-lora" in words


def test_extra_options_come_last_so_that_they_win(prepare) -> None:
    extra = ["--max-cpu-loras", "9", "--enforce-eager"]
    assert prepare(*extra).command[-3:] == extra


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("--host", "0.0.0.0"), "--allow-remote"),
        (("--host=0.0.0.0",), "--allow-remote"),
        (("--hos", "0.0.0.0"), "--allow-remote"),  # which vLLM's parser takes for --host
        (("--enforce-eager", "--port", "9000"), "--port cannot .* use it before"),
        (("--model", "other"), "--model cannot .* use it before"),
        (("--max_loras", "9"), "--max_loras cannot .* use it before"),
        (("--api-key", "secret"), "set VLLM_API_KEY"),
        (("--trust-remote-code",), "code of a model's own is never run"),
        (("--api_key=secret",), "set VLLM_API_KEY"),
        (("--uds", "/tmp/socket"), "over TCP"),
        (("--config=vllm.yaml",), "one by one"),
    ],
)
def test_an_extra_option_that_has_a_setting_is_refused(
    prepare, words: tuple[str, ...], cure: str
) -> None:
    with pytest.raises(ConfigError, match=cure) as refused:
        prepare(*words)
    assert "secret" not in str(refused.value)


def test_extra_options_that_begin_like_a_setting_are_accepted(prepare) -> None:
    extra = [
        *("--max-num-seqs", "8", "-tp", "2", "--model-impl=auto", "--api-server-count", "1"),
        *("--max-lora-rank", "64", "--max-model-len=512"),
    ]
    assert prepare(*extra).command[-len(extra) :] == extra


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_a_host_that_others_can_reach_is_refused_with_the_reason(prepare, host: str) -> None:
    with pytest.raises(ConfigError, match=r"/invocations.*--allow-remote"):
        prepare(host=host)
    assert host in prepare(host=host, port=1, allow_remote=True).command


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_loopback_host_is_accepted(prepare, host: str) -> None:
    assert host in prepare(host=host, port=1).command


def test_environment_variables_of_the_user_win_over_ours(prepare, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    made = prepare().environment
    assert made["VLLM_NO_USAGE_STATS"] == "0"
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert made["PATH"] == os.environ["PATH"]
    assert made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert made["HF_HUB_OFFLINE"] == "1"


def test_the_answers_prompts_and_stops_of_a_request_are_bounded(prepare, monkeypatch) -> None:
    bounds = {
        "VLLM_MAX_N_SEQUENCES": "16",
        "VLLM_MAX_COMPLETION_PROMPTS": "16",
        "VLLM_MAX_STOP_STRINGS": "32",
    }
    for name in bounds:
        monkeypatch.delenv(name, raising=False)
    assert bounds.items() <= prepare().environment.items()
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "64")
    assert prepare().environment["VLLM_MAX_N_SEQUENCES"] == "64"


def test_another_interpreter_does_not_inherit_python_variables(
    prepare, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PYTHONHOME", "/ours")
    assert not prepare().environment.keys() & {"PYTHONPATH", "PYTHONHOME"}
    monkeypatch.setattr("agentpref_adapters._vllm_process.find_python", lambda _: sys.executable)
    same = vllm_process("tiny", logs=tmp_path).environment
    assert (same["PYTHONPATH"], same["PYTHONHOME"]) == ("/ours", "/ours")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("::1", "http://[::1]:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
    ],
)
def test_the_url_of_a_host_is_one_this_machine_can_reach(prepare, host: str, url: str) -> None:
    assert prepare(host=host, port=1, allow_remote=True).url == url


def test_an_interpreter_without_vllm_is_refused_with_the_install_command() -> None:
    with pytest.raises(MissingDependency, match=r"cannot import vLLM; .*/pip install vllm"):
        find_python(sys.executable)


def test_an_interpreter_that_does_not_exist_is_refused() -> None:
    with pytest.raises(MissingDependency, match="/nowhere/python cannot import vLLM"):
        find_python("/nowhere/python")


def test_an_interpreter_that_has_vllm_is_used(
    python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_python(str(python)) == str(python)
    monkeypatch.chdir(python.parent)
    assert find_python("./python") == str(python)


def test_the_interpreter_beside_vllm_on_the_path_is_used(
    python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{python.parent}:/bin")
    with pytest.raises(MissingDependency, match="--python vllm-env/bin/python"):
        find_python()
    script = python.with_name("vllm")
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert find_python() == str(python)


def test_a_base_that_does_not_exist_is_refused_before_the_server_starts(
    python: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFound):
        vllm_process(str(tmp_path / "no"), python=str(python), logs=tmp_path)


def test_preparing_a_server_imports_no_vllm_and_starts_no_process(prepare, tmp_path: Path) -> None:
    server = prepare()
    assert psutil.Process().children() == []
    port = server.url.rpartition(":")[2]
    assert server.log == tmp_path / f"vllm-{port}.log"
    assert find_base("tiny").is_dir()
    assert "vllm" not in sys.modules


def test_without_httpx_the_error_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['httpx'] = None; import agentpref_adapters._vllm_process"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "vLLM needs httpx; install it with: pip install 'agentpref[vllm]'" in run.stderr
