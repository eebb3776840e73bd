"""How a vLLM server is found and started. tests/vllm_server starts a real one."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from agentpref.errors import ConfigError, MissingDependency, ModelNotFound
from agentpref.models.base import find_base
from agentpref_adapters._vllm_process import (
    VllmSettings,
    environment,
    find_python,
    serve_arguments,
    server_url,
    vllm_process,
)


def arguments(**settings: object) -> list[str]:
    return list(serve_arguments(VllmSettings("tiny", **settings), Path("/base"), 8123))


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_the_command_line_names_the_base_and_the_limits_of_adapters() -> None:
    words = arguments(max_loras=3, max_lora_rank=64, dtype="float32", max_model_len=512)
    assert value(words, "--model") == "/base"
    assert value(words, "--served-model-name") == "base"
    assert value(words, "--host") == "127.0.0.1"
    assert value(words, "--port") == "8123"
    assert value(words, "--max-loras") == "3"
    assert value(words, "--max-cpu-loras") == "3"
    assert value(words, "--max-lora-rank") == "64"
    assert value(words, "--dtype") == "float32"
    assert value(words, "--max-model-len") == "512"
    assert "--enable-lora" in words
    assert "--max-model-len" not in arguments()


def test_extra_options_come_last_so_that_they_win() -> None:
    words = arguments(extra=("--max-cpu-loras", "9", "--enforce-eager"))
    assert words[-3:] == ["--max-cpu-loras", "9", "--enforce-eager"]


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("--host", "0.0.0.0"), "--allow-remote"),
        (("--host=0.0.0.0",), "--allow-remote"),
        (("--hos", "0.0.0.0"), "--allow-remote"),  # which vLLM's parser takes for --host
        (("--enforce-eager", "--port", "9000"), "use --port before"),
        (("--model", "other"), "use --model before"),
        (("--max_loras", "9"), "use --max-loras before"),
        (("--max-lora-rank=64",), "use --max-lora-rank before"),
        (("--dtype", "half"), "use --dtype before"),
        (("--max_model_len=9",), "use --max-model-len before"),
        (("--api-key", "secret"), "set VLLM_API_KEY"),
        (("--api_key=secret",), "set VLLM_API_KEY"),
        (("--uds", "/tmp/socket"), "over TCP"),
        (("--config=vllm.yaml",), "one by one"),
    ],
)
def test_an_extra_option_that_has_a_setting_is_refused(words: tuple[str, ...], cure: str) -> None:
    with pytest.raises(ConfigError, match=cure) as refused:
        VllmSettings("tiny", extra=words)
    assert "secret" not in str(refused.value)


def test_extra_options_that_begin_like_a_setting_are_accepted() -> None:
    extra = ("--max-num-seqs", "8", "-tp", "2", "--model-impl=auto", "--api-server-count", "1")
    assert VllmSettings("tiny", extra=extra).extra == extra


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_a_host_that_others_can_reach_is_refused_with_the_reason(host: str) -> None:
    with pytest.raises(ConfigError, match=r"/invocations.*--allow-remote"):
        VllmSettings("tiny", host=host)
    assert VllmSettings("tiny", host=host, allow_remote=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_loopback_host_is_accepted(host: str) -> None:
    assert VllmSettings("tiny", host=host).host == host


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"max_loras": 0}, "max_loras is 0"),
        ({"max_lora_rank": 12}, "max_lora_rank is 12"),
    ],
)
def test_values_that_vllm_would_refuse_are_refused(setting, words) -> None:
    with pytest.raises(ConfigError, match=words):
        VllmSettings("tiny", **setting)


def test_environment_variables_of_the_user_win_over_ours() -> None:
    found = {"VLLM_NO_USAGE_STATS": "0", "PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "1"}
    made = environment(found, same_interpreter=True)
    assert made.items() >= found.items()
    assert made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert made["HF_HUB_OFFLINE"] == "1"


def test_another_interpreter_does_not_inherit_python_variables() -> None:
    found = {"PYTHONPATH": "/ours", "PYTHONHOME": "/ours"}
    assert environment(found, same_interpreter=True).items() >= found.items()
    assert not environment(found, same_interpreter=False).keys() & found.keys()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("::1", "http://[::1]:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
    ],
)
def test_the_url_of_a_host_is_one_this_machine_can_reach(host: str, url: str) -> None:
    assert server_url(host, 1) == url


def test_an_interpreter_without_vllm_is_refused_with_the_install_command() -> None:
    with pytest.raises(MissingDependency, match=r"has no vLLM; .* -m pip install vllm"):
        find_python(sys.executable)


def test_an_interpreter_that_does_not_exist_is_refused() -> None:
    with pytest.raises(MissingDependency, match="/nowhere/python is no program"):
        find_python("/nowhere/python")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A program that says it has vLLM."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    return python


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
        vllm_process(VllmSettings(str(tmp_path / "no"), python=str(python)), logs=tmp_path)


def test_preparing_a_server_imports_no_vllm_and_starts_no_process(
    python: Path, tmp_path: Path
) -> None:
    server = vllm_process(VllmSettings("tiny", python=str(python)), logs=tmp_path)
    assert psutil.Process().children() == []
    port = server.url.rpartition(":")[2]
    assert server.log == tmp_path / f"vllm-{port}.log"
    assert find_base("tiny").is_dir()
    assert "vllm" not in sys.modules
