"""`schedule`: what it prints reaches the update as it is, and what it installs it removes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from agentpref.home import Home
from agentpref_cli.oneself import own_command
from agentpref_cli.schedules import At, Job, cron, kubernetes, systemd

HOSTILE = [
    "two words", "$HOME", "${HOME}", "$(id)", "`id`", "100%n", "%%", "it's", 'say "hi"',
    "back\\slash", "end\\", "a;b", ";", "#no", "-dash", "é ü 漢", "a&b|c>d", "*?[x]", "~", "!x",
    "a=b", "$$", "{x}", "\\n",
]  # fmt: skip
SYSTEMD = Path("/lib/systemd/systemd")


def job(**changes: object) -> Job:
    values = {
        "name": "nightly",
        "command": ["/srv/shop/.venv/bin/agentpref"],
        "update": ["--home=/srv/shop/.agentpref", "--model=tiny"],
        "home": Path("/srv/shop/.agentpref"),
        "namespace": "default",
        "at": At(3, 30),
        "user": "www-data",
    }
    return Job(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for the system's programs, which keep what they were called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("systemctl", "kubectl"):
        text = f'#!/bin/sh\necho {name} "$@" >>"{folder}/calls"\n'
        text += f'[ "$1" != apply ] || cat >"{folder}/applied"\n'
        (folder / name).write_text(text, encoding="utf-8")
    table = f'#!/bin/sh\ncase $1 in -l) cat "{folder}/table" ;; -) cat >"{folder}/table" ;; esac\n'
    (folder / "crontab").write_text(table, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return folder


def calls(programs: Path) -> list[str]:
    return (programs / "calls").read_text(encoding="utf-8").splitlines()


# systemd


def as_systemd_reads(unit: Path, runtime: Path) -> list[list[str]]:
    """The command lines of a service as systemd itself understands them."""
    runtime.chmod(0o777)
    command = [str(SYSTEMD), "--user", "--test", f"--unit={unit.name}"]
    if os.geteuid() == 0:  # it refuses to be root's
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/tmp",
        "XDG_RUNTIME_DIR": str(runtime),
        "SYSTEMD_UNIT_PATH": f"{unit.parent}:",
        "LANG": "C.UTF-8",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    _, found, text = done.stdout.partition(f"-> Unit {unit.name}:")
    assert found, done.stderr or done.stdout[-500:]
    text = text.partition("-> Unit ")[0]
    lines = [line.partition("Command Line: ")[2] for line in text.splitlines()]
    return [[*map(_unquoted, _WORD.findall(line))] for line in lines if line]


_WORD = re.compile(r'"(?:\\.|[^"\\])*"|\S+')


def _unquoted(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1]) if word.startswith('"') else word


@pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not installed")
def test_systemd_hands_on_every_word_as_it_is(reachable: Path) -> None:
    """systemd writes the words that it has read so that a shell reads them."""
    words = [["/bin/true", text, f"--home=/x/{text}/y"] for text in HOSTILE]
    service = reachable / "hostile.service"
    lines = "".join(f"ExecStart={systemd.command_line(line)}\n" for line in words)
    service.write_text(f"[Service]\nType=oneshot\n{lines}", encoding="utf-8")
    service.chmod(0o644)
    reachable.chmod(0o755)
    assert as_systemd_reads(service, reachable) == words


@pytest.mark.parametrize("folder", ['quo"ted', "dollar$HOME", "per%cent", "back\\slash"])
def test_a_program_in_a_hostile_folder_is_run_all_the_same(tmp_path: Path, folder: str) -> None:
    program = tmp_path / folder / "agentpref"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s|" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    line = systemd.command_line([str(program), "update", "--home=$x y"]).removeprefix(":")
    shown = line.replace("%%", "%").replace("$", "\\$")  # what is left is a shell's quoting
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout == "update|--home=$x y|"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("of_system", [True, False])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_systemd_finds_nothing_wrong_with_the_units(
    reachable: Path, of_system: bool, zone: str | None
) -> None:
    home = reachable / "a b%c$d\"'"
    made = job(
        command=own_command(), home=home, update=[f"--home={home}"], at=At(3, 30, zone),
        of_system=of_system, environment={"HF_HOME": str(home)}, writes=[home], user="root",
    )  # fmt: skip
    units = []
    for path, text in systemd.plan(made).files.items():
        unit = reachable / path.name
        unit.write_text(text, encoding="utf-8")
        units.append(str(unit))
    command = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_service_of_the_system_runs_as_the_owner_and_writes_to_the_home_only() -> None:
    service, timer = systemd.plan(job(of_system=True)).files.values()
    assert {"User=www-data", "ProtectSystem=strict", "PrivateTmp=yes", "NoNewPrivileges=yes"} <= {
        *service.splitlines()
    }
    assert "ReadWritePaths=/srv/shop/.agentpref\n" in service
    assert "SuccessExitStatus=3 4 5 7\n" in service, "0 is; 6 and 75 are not"
    assert "OnCalendar=*-*-* 03:30:00\n" in timer
    assert {"Persistent=true", "RandomizedDelaySec=10min", "WantedBy=timers.target"} <= {
        *timer.splitlines()
    }


def test_a_home_below_tmp_is_reached_and_a_notifier_may_write() -> None:
    service, _ = systemd.plan(job(of_system=True, home=Path("/tmp/home"))).files.values()
    assert "PrivateTmp" not in service
    service, _ = systemd.plan(job(of_system=True, notifies=True)).files.values()
    assert "ProtectSystem" not in service
    assert "NoNewPrivileges" not in service


# Kubernetes


def expanded(text: str) -> str:
    """What Kubernetes makes of a word of a command: `$$` is `$`, and `$(NAME)` a variable."""
    out, at = "", 0
    while at < len(text):
        if text[at : at + 2] == "$$":
            out, at = out + "$", at + 2
        elif text[at : at + 2] == "$(" and ")" in text[at:]:
            out, at = f"{out}<EXPANDED>", text.index(")", at) + 1
        else:
            out, at = out + text[at], at + 1
    return out


def test_a_manifest_hands_on_every_word_as_it_is() -> None:
    words = [f"--home=/x/{text}/y" for text in HOSTILE]
    made = job(update=words, image="img:1", claim="home", environment={"A": "$(B) $C"})
    found = yaml.safe_load(kubernetes.plan(made).manifest)
    container = found["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert [*map(expanded, container["command"])][3:] == ["sh", *made.words]
    assert expanded(container["env"][0]["value"]) == "$(B) $C"


def test_a_cronjob_has_its_zone_no_overlap_and_the_home(run, home: Path) -> None:
    words = ["--home", "/data/it's", "--model", "/models/m", "--image", "i:1", "--claim", "c"]
    words += ["--at", "03:05 Europe/Berlin", "--as", "kubernetes"]
    found = yaml.safe_load(run("schedule", *words).out)
    spec = found["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("5 3 * * *", "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 21_600)
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "home", "mountPath": "/data/it's"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "c"}
    assert pod["containers"][0]["command"][4:7] == ["agentpref", "update", "--home=/data/it's"]


@pytest.mark.parametrize(
    ("code", "shown"), [(0, 0), (3, 0), (4, 0), (5, 0), (7, 0), (6, 6), (1, 1)]
)
def test_a_pod_succeeds_after_a_night_that_went_well(tmp_path: Path, code: int, shown: int) -> None:
    made = job(image="i", claim="c", command=["sh", "-c", f"exit {code}"], update=[])
    found = yaml.safe_load(kubernetes.plan(made).manifest)
    pod = found["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    command = [*map(expanded, pod["containers"][0]["command"])]
    command[2] = command[2].replace("% 600", "% 1")  # the delay
    assert subprocess.run(command, check=False).returncode == shown


# The command


def test_the_printed_command_line_is_this_very_one(run, filled: Path, tmp_path: Path) -> None:
    config = tmp_path / "update.toml"
    config.write_text("max_minutes = 5\n", encoding="utf-8")
    os.chdir(tmp_path)
    words = ["--model", "tiny", "--config", "update.toml", "--notify", "cat -", "--at", "23:59"]
    value = run("schedule", *words, "--user", "--json").json
    service, timer = value["files"].values()
    line = next(line for line in service.splitlines() if line.startswith("ExecStart=:"))
    assert shlex.split(line.removeprefix("ExecStart=:")) == [
        *own_command(), "update", f"--home={filled}", "--namespace=default", "--model=tiny",
        f"--config={config}", f"--notify={shutil.which('cat')} -",
    ]  # fmt: skip
    assert "23:59" in timer
    assert any(hint.startswith("try it once: systemctl --user start") for hint in value["hints"])
    assert any(hint.startswith("its log: journalctl --user -u") for hint in value["hints"])


def test_units_are_installed_and_removed(run, filled: Path, programs: Path, tmp_path: Path) -> None:
    units = tmp_path / "config" / "systemd" / "user"
    words = ("schedule", "--user", "--name", "shop")
    run(*words, "--model", "tiny", "--install")
    assert {file.name for file in units.iterdir()} == {"shop.service", "shop.timer"}
    control = "systemctl --user"
    assert calls(programs) == [f"{control} daemon-reload", f"{control} enable --now shop.timer"]
    run(*words, "--model", "tiny", "--at", "04:00", "--install")
    assert "04:00" in (units / "shop.timer").read_text(encoding="utf-8"), "it is replaced"
    run(*words, "--remove")
    assert [*units.iterdir()] == []
    assert calls(programs)[-2:] == [
        f"{control} disable --now shop.timer",
        f"{control} daemon-reload",
    ]
    assert "nothing was removed" in run(*words, "--remove").out


def test_a_file_of_somebody_else_is_left_alone(run, filled, programs, tmp_path) -> None:
    units = tmp_path / "config" / "systemd" / "user"
    run("schedule", "--user", "--model", "tiny", "--install")
    other = tmp_path / "other"
    run("init", "--home", other)
    for words in (["--model", "tiny", "--install"], ["--remove"]):
        said = run("schedule", "--user", "--home", other, *words, exits=2).err
        assert "is not this home's schedule" in said
    assert str(filled) in (units / "agentpref-update.service").read_text(encoding="utf-8")


def test_a_line_of_cron_is_installed_and_removed_and_others_stay(
    run, filled: Path, programs: Path, tmp_path: Path
) -> None:
    table = programs / "table"
    table.write_text("MAILTO=me@example.org\n5 5 * * * other\n", encoding="utf-8")
    words = ("schedule", "--as", "cron", "--name", "shop")
    for at in ("02:10", "02:20"):
        run(*words, "--model", "tiny", "--at", at, "--install")
    script = tmp_path / "config" / "agentpref" / "shop.sh"
    assert table.read_text(encoding="utf-8").splitlines()[:2] == [
        "MAILTO=me@example.org",
        "5 5 * * * other",
    ]
    assert table.read_text(encoding="utf-8").count(f"20 2 * * * {script}\n") == 1
    assert "10 2" not in table.read_text(encoding="utf-8")
    assert script.stat().st_mode & 0o777 == 0o700
    run(*words, "--remove")
    assert table.read_text(encoding="utf-8") == "MAILTO=me@example.org\n5 5 * * * other\n"
    assert not script.exists()


def test_a_first_crontab_is_made(run, filled: Path, programs: Path) -> None:
    run("schedule", "--as", "cron", "--model", "tiny", "--install")
    lines = (programs / "table").read_text(encoding="utf-8").splitlines()
    assert [line[:8] for line in lines] == ["# agentp", "0 3 * * ", "# agentp"]


def test_a_cronjob_is_applied_and_deleted(run, programs: Path) -> None:
    words = ("schedule", "--as", "kubernetes", "--home", "/data")
    run(*words, "--model", "m", "--image", "i", "--claim", "c", "--install")
    assert yaml.safe_load((programs / "applied").read_bytes())["kind"] == "CronJob"
    run(*words, "--remove")
    assert calls(programs) == ["kubectl apply -f -", "kubectl delete cronjob agentpref-update"]


def test_a_program_of_the_system_that_fails_is_told(run, filled, programs: Path) -> None:
    (programs / "systemctl").write_text("#!/bin/sh\necho no bus >&2\nexit 1\n", encoding="utf-8")
    said = run("schedule", "--user", "--model", "tiny", "--install", exits=1).err
    assert "`systemctl --user daemon-reload` exited 1: no bus" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tiny", "--at", "25:00"], "is no time of day"),
        (["--model", "tiny", "--at", "03:00 Mars/Base"], "is no time zone"),
        (["--model", "tiny", "--as", "cron", "--at", "03:00 Asia/Tokyo"], "machine's time zone"),
        (["--model", "tiny", "--install", "--remove"], "choose this or --install"),
        ([], "--model"),
        (["--model", "/no/such/folder"], "is no folder"),
        (["--model", "tiny", "--name", "a/b"], "cannot name a unit"),
        (["--model", "tiny", "--name", "-x"], "cannot name a unit"),
        (["--model", "tiny", "--image", "x"], "--as kubernetes"),
        (["--model", "tiny", "--as", "kubernetes", "--home", "/x"], "Kubernetes needs it"),
        (["--model", "tiny", "--as", "kubernetes", "--home", "x"], "is relative"),
        (["--model", "tiny", "--as", "cron", "--user"], "units of systemd"),
        (["--model", "tiny", "--notify", "it's"], "cannot be split"),
        (["--model", "a\nb"], "control character"),
    ],
)  # fmt: skip
def test_bad_usage_exits_2(run, filled, words, said) -> None:
    assert said in " ".join(run("schedule", *words, exits=2).err.split())


def test_wrong_settings_are_said_in_the_evening(run, filled, tmp_path: Path) -> None:
    config = tmp_path / "update.toml"
    config.write_text("max_minute = 5\n", encoding="utf-8")
    assert "did you mean" in run("schedule", "--model", "tiny", "--config", config, exits=2).err


def test_there_must_be_a_home(run, home: Path) -> None:
    assert "agentpref init" in run("schedule", "--model", "tiny", exits=1).err


# The line and the script of cron


@pytest.fixture
def nightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install the script of a command, and run it as cron does, or by hand."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "con % f'ig"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "sta $HOME te"))

    def install(*words: str, **also: object) -> tuple[list[str], Path]:
        made = job(command=[*words], update=also.pop("update", []), **also)
        ((script, text),) = cron.plan(made).files.items()
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text.replace("delay=600", "delay=0"), encoding="utf-8")
        script.chmod(0o700)
        command = cron.line(made).split(maxsplit=5)[5].replace(r"\%", "%")
        return ["/bin/sh", "-c", command], tmp_path / "sta $HOME te" / "agentpref" / "nightly.log"

    return install


def as_cron_runs(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/", "SHELL": "/bin/sh"}
    if "PYTHONPATH" in os.environ:  # how this checkout is found, where it is not installed
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_cron_hands_on_every_word_as_it_is(nightly) -> None:
    code = "import os, sys; print([os.environ['A'], *sys.argv[2:]])"
    command, log = nightly(sys.executable, "-c", code, update=HOSTILE, environment={"A": "$(id)'"})
    assert as_cron_runs(command).returncode == 0
    assert repr(["$(id)'", *HOSTILE]) in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("code", [0, 3, 4, 5, 7])
def test_a_night_that_went_well_is_logged_and_mails_nothing(nightly, code: int) -> None:
    command, log = nightly("sh", "-c", f"echo said by the command; exit {code}")
    done = as_cron_runs(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = log.read_text(encoding="utf-8")
    assert "said by the command" in text
    assert f"exit code {code}: " in text
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "failed"), (2, "bad usage"), (6, "none of the new feedback"), (75, "busy"),
     (130, "signal"), (137, "killed"), (143, "signal"), (134, "failed")],
)  # fmt: skip
def test_a_night_that_failed_is_mailed_with_what_was_said(nightly, code: int, words: str) -> None:
    as_cron_runs(nightly("sh", "-c", "echo of the night before")[0])
    command, log = nightly("sh", "-c", f"echo said by the command; exit {code}")
    done = as_cron_runs(command)
    assert done.returncode == code
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"agentpref update: exit code {code}: ")
    assert words in first
    assert first in log.read_text(encoding="utf-8")
    assert "said by the command" in done.stdout
    assert "night before" not in done.stdout


def test_a_command_that_is_not_there_is_mailed(nightly) -> None:
    done = as_cron_runs(nightly("/not/installed")[0])
    assert done.returncode == 127
    assert "cannot be run" in done.stdout


def test_a_log_that_cannot_be_written_is_mailed(nightly) -> None:
    command, log = nightly("true")
    log.mkdir(parents=True)
    done = as_cron_runs(command)
    assert done.returncode == 1
    assert "nightly.log" in done.stderr


def test_the_real_command_runs_under_cron(nightly, tmp_path: Path) -> None:
    home = tmp_path / "it's home"
    Home.create(home)
    command, log = nightly(*own_command(), update=[f"--home={home}", "--model=tiny"])
    done = as_cron_runs(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "exit code 3: nothing new" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_who_stops_the_job_stops_the_update_and_the_log_has_it(
    nightly, tmp_path: Path, signum: signal.Signals
) -> None:
    """The stand-in ends in its own time, as an update does that finishes its step."""
    started = tmp_path / "started"
    script = f"trap 'sleep .3; echo ended by a signal; exit 143' TERM; touch {started}; "
    command, log = nightly("sh", "-c", script + "while :; do sleep .05; done")
    (job,) = shlex.split(command[2])

    def as_cron_starts() -> None:
        """A shell cannot catch what it was started to ignore, and these tests may run in nohup."""
        signal.signal(signum, signal.SIG_DFL)

    with subprocess.Popen([job], stdout=subprocess.PIPE, preexec_fn=as_cron_starts) as running:
        while not started.exists():
            time.sleep(0.02)
        running.send_signal(signum)
        running.communicate()
    assert running.returncode == 143
    assert log.read_text(encoding="utf-8").splitlines()[1:] == [
        "ended by a signal",
        "agentpref update: exit code 143: ended by a signal; the next update resumes it",
    ]
