"""The workflows of .github and .ci/run: what they may do, and that what they call is there and ends as they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cm_runtime.bench.scenario import read_suite
from cm_runtime.cli import app, parsing

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS: dict[str, dict[Any, Any]] = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
ON: Any = True  # what YAML makes of the key `on`
BASH = ["/usr/bin/env", "bash", "--noprofile", "--norc", "-eo", "pipefail"]  # GitHub's `shell: bash`
VARIABLES = {
    "BASE": "HEAD~1",
    "COUNT": "10000",
    "GATE": "5%",
    "RUNNER_TEMP": "/tmp/runner",
    "GITHUB_STEP_SUMMARY": "summary.md",
}
Fake = Callable[[str, str], None]


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, workflow in WORKFLOWS.items():
        for job, content in workflow["jobs"].items():
            yield f"{name}.{job}", content


def steps(key: str) -> list[tuple[str, Any]]:
    """(job, value) of every step that has ``key``: "run" or "uses"."""
    return [(name, step[key]) for name, job in jobs() for step in job["steps"] if key in step]


def snippet(name: str) -> str:
    """The commands of the benchmark step of that name."""
    (found,) = (step["run"] for step in WORKFLOWS["bench"]["jobs"]["gpu"]["steps"] if step.get("name") == name)
    return str(found)


def commands(script: str, program: str) -> list[list[str]]:
    """The words behind each call of ``program``, with VARIABLES in place of $NAME; a KeyError for another name."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&><")
        lexer.whitespace_split = True
        words = [*lexer, ";"]
        while program in words:
            words = words[words.index(program) + 1 :]
            end = next(n for n, word in enumerate(words) if set(word) <= set(";|&><"))
            found.append([re.sub(r"\$\{?(\w+)\}?", lambda name: VARIABLES[name[1]], word) for word in words[:end]])
    return found


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """What the command line makes of ``words``, (command, its options), without running it."""
    called: list[tuple[str, dict[str, Any]]] = []

    def replace(command: Any, path: str) -> None:
        for name, one in getattr(command, "commands", {}).items():
            replace(one, f"{path} {name}".strip())
        if not hasattr(command, "commands"):
            command.callback = lambda **options: called.append((path, options))

    group = typer.main.get_command(app)
    replace(group, "")
    group.main(words, standalone_mode=False)
    (only,) = called
    return only


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a program of that name and shell text before all others on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    return put


def bash(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A step's commands, as a GitHub runner runs them."""
    (cwd / "step.sh").write_text(script)
    return subprocess.run(
        [*BASH, "step.sh"], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


# What the workflows may do


def test_there_are_tests_and_benchmarks() -> None:
    assert list(WORKFLOWS) == ["bench", "fuzz", "tests"]
    assert {"push", "pull_request", "schedule", "workflow_dispatch"} == set(WORKFLOWS["tests"][ON])
    assert not WORKFLOWS["tests"][ON]["push"] and not WORKFLOWS["tests"][ON]["pull_request"], "of every branch"
    assert {"push", "pull_request", "workflow_dispatch"} == set(WORKFLOWS["bench"][ON])


def test_they_only_read() -> None:
    assert {name: workflow["permissions"] for name, workflow in WORKFLOWS.items()} == {
        name: {"contents": "read"} for name in WORKFLOWS
    }
    assert not [name for name, job in jobs() if "permissions" in job]
    assert not [file.name for file in FILES if "secrets." in file.read_text()]


def test_no_expression_is_pasted_into_a_shell() -> None:
    assert len(steps("run")) > 5
    assert not [(name, text) for name, text in steps("run") if "${{" in text], "give it by env:"


def test_jobs_have_a_time_limit_and_keep_no_credentials() -> None:
    assert not [name for name, job in jobs() if job.get("timeout-minutes", 360) >= 360]
    checkouts = [step for _, job in jobs() for step in job["steps"] if "actions/checkout@" in step.get("uses", "")]
    assert len(checkouts) == len(list(jobs()))
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_actions_are_pinned_by_commit_with_their_version_beside_it() -> None:
    lines = [
        line.split("uses:")[1].strip() for file in FILES for line in file.read_text().splitlines() if "uses:" in line
    ]
    assert len(lines) == len(steps("uses")) > 0
    assert not [line for line in lines if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)]


@pytest.mark.parametrize(
    ("event", "label", "head", "runs"),
    [
        ("push", None, None, True),
        ("workflow_dispatch", None, None, True),
        ("pull_request", "benchmark", "we/cm-runtime", True),
        ("pull_request", "benchmark", "fork/cm-runtime", False),
        ("pull_request", "docs", "we/cm-runtime", False),
    ],
)
def test_no_fork_reaches_a_gpu_runner(event: str, label: str | None, head: str | None, runs: bool) -> None:
    job = WORKFLOWS["bench"]["jobs"]["gpu"]
    known = {
        "github.event_name": event,
        "github.event.label.name": label,
        "github.event.pull_request.head.repo.full_name": head,
        "github.repository": "we/cm-runtime",
    }
    condition = re.sub(r"github[\w.]+", lambda name: repr(known[name[0]]), job["if"])
    assert eval(condition.replace("||", "or").replace("&&", "and")) is runs
    assert job["runs-on"] == ["self-hosted", "linux", "gpu"]
    assert WORKFLOWS["bench"][ON]["pull_request"] == {"types": ["labeled"]}
    assert WORKFLOWS["bench"][ON]["push"] == {"branches": ["main"]}


def test_a_benchmark_is_alone_and_not_stopped_midway() -> None:
    job = WORKFLOWS["bench"]["jobs"]["gpu"]
    assert job["concurrency"] == {"group": "benchmarks", "cancel-in-progress": False}
    assert "concurrency" not in WORKFLOWS["bench"]
    assert WORKFLOWS["tests"]["concurrency"]["cancel-in-progress"] is True
    assert "'refs/heads/main' && github.run_id ||" in WORKFLOWS["tests"]["concurrency"]["group"]


def test_results_are_kept_whatever_happens() -> None:
    (upload,) = (one for one in WORKFLOWS["bench"]["jobs"]["gpu"]["steps"] if "upload-artifact@" in one.get("uses", ""))
    assert upload["if"] == "always()"
    (_, run), (_, report) = (parsed(commands(snippet(name), "cm-runtime")[0]) for name in ("Measure", "Report"))
    written = [Path("gpu.json"), run["output"], run["output"].with_suffix(".samples.jsonl"), report["output"]]
    assert upload["with"]["path"].split() == list(map(str, written))


# What they call


def test_the_command_line_knows_every_cm_runtime_command() -> None:
    found = [parsed(words) for _, text in steps("run") for words in commands(text, "cm-runtime")]
    assert sum(text.count("cm-runtime ") for _, text in steps("run")) == len(found)
    assert [name for name, _ in found] == ["sample", "bench run", "bench report", "bench compare"]
    _, run, report, compare = (options for _, options in found)
    assert read_suite(str(ROOT / run["suite"])).scenarios()
    assert (run["against"], run["output"], run["device"]) == ("HEAD~1", Path("bench.json"), "auto")
    assert report["markdown"] and report["result"] == compare["base"] == run["output"] and compare["new"] is None
    inputs = WORKFLOWS["bench"][ON]["workflow_dispatch"]["inputs"]
    assert parsing.share("--fail-above", inputs["gate"]["default"]) == parsing.share("", compare["fail_above"]) == 0.05


@pytest.mark.parametrize(
    "words",
    ["bench run --suit a.toml --agianst x", "bench compare bench.json --fail-over=5%", "bench judge bench.json"],
)
def test_a_renamed_option_or_command_is_noticed(words: str) -> None:
    with pytest.raises(Exception, match=r"No such (option|command)"):
        parsed(commands(f"status=0; cm-runtime {words} || status=$?", "cm-runtime")[0])


def test_make_knows_every_target() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    script = "\n".join([*(text for _, text in steps("run")), (ROOT / ".ci" / "run").read_text()])
    called = {word for words in commands(script, "make") for word in words if "=" not in word}
    assert {"test", "test-all", "test-floors", "fuzz", "gpu-check"} <= called <= targets
    assert ("tests.cpu", "bash .ci/run") in steps("run")
    assert ("tests.all", "make test-all") in steps("run")
    (nightly,) = WORKFLOWS["tests"][ON]["schedule"]
    assert nightly["cron"].endswith(" * * *"), "every night"


def test_gpu_check_runs_with_the_packages_that_were_installed() -> None:
    """And not with those of the tests, among which is no CUDA."""
    (words,) = commands(snippet("Check the GPU build"), "make")
    assert words == ["gpu-check", "GPU_PYTHON=python", "GPU_RESULT=gpu.json", "GPU_ARGS=--budget 3600"]


@pytest.mark.process
def test_one_onnxruntime_is_installed(tmp_path: Path, fake: Fake) -> None:
    installed = tmp_path / "runner" / "venv" / "bin"
    python = f'#!/bin/sh\\necho "$@" >> {tmp_path}/pip.log\\n'
    fake("python3", f"mkdir -p {installed}; printf '{python}' > {installed}/python; chmod +x {installed}/python")
    done = bash(snippet("Install"), tmp_path, RUNNER_TEMP=str(tmp_path / "runner"), GITHUB_PATH=str(tmp_path / "path"))
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "pip.log").read_text().splitlines()
    assert " install " in line and ".[gpu," in line and "cpu" not in line
    assert (tmp_path / "path").read_text().strip() == str(installed)


# How they end


@pytest.mark.process
@pytest.mark.parametrize(
    ("status", "ends", "warns"), [(0, 0, False), (1, 1, False), (2, 2, False), (3, 3, False), (4, 0, True)]
)
def test_the_gate_fails_on_regressions_and_warns_of_the_inconclusive(
    status: int, ends: int, warns: bool, tmp_path: Path, fake: Fake
) -> None:
    fake("cm-runtime", f'echo "$@" > asked; exit {status}')
    done = bash(snippet("Gate"), tmp_path, GATE="3%")
    assert (done.returncode, "::warning" in done.stdout) == (ends, warns)
    assert (tmp_path / "asked").read_text() == "bench compare bench.json --fail-above=3%\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits, tagged one, two and three."""
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    commits = [words for n in ("one", "two", "three") for words in (["commit", "-qm", n, "--allow-empty"], ["tag", n])]
    for words in (["init", "-q"], *commits):
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize(
    ("asked", "before", "base"),
    [
        ("", "one", "one"),  # a push of two commits
        ("", "0" * 40, "two"),  # of a new branch
        ("", "12" * 20, "two"),  # a forced push
        ("", "", "two"),  # a pull request
        ("one", "", "one"),  # on request
        ("HEAD~1", "", "two"),
        ("nowhere", "", None),
        ("--all", "", None),
    ],
)
def test_the_base_is_the_commit_before(asked: str, before: str, base: str | None, repository: Path) -> None:
    def commit(name: str) -> str:
        return subprocess.check_output(["git", "rev-parse", name], cwd=repository, text=True).strip()

    before = commit(before) if before == "one" else before
    done = bash(snippet("Choose the base"), repository, ASKED=asked, BEFORE=before, GITHUB_ENV="found")
    found = repository / "found"
    if base is None:
        assert done.returncode != 0 and not found.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert found.read_text() == f"BASE={commit(base)}\n"


# .ci/run


@pytest.fixture
def bare(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of root's with apt-get and no browser: the folder of what was called, and how."""
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    for name in ("bash", "dirname"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    fake("id", "echo 0")
    for name in ("apt-get", "make"):
        fake(name, f'echo {name} "$@" >> "$LOG"; echo noise')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def ci() -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci" / "run"], capture_output=True, text=True, timeout=60)


@pytest.mark.process
def test_ci_installs_chromium_and_then_tests(bare: Path) -> None:
    done = ci()
    assert (done.returncode, done.stdout, done.stderr) == (0, "noise\n", ""), "make's own alone"
    update, install, test = (bare / "log").read_text().splitlines()
    assert update == "apt-get -qq update"
    assert install == "apt-get -qq install -y --no-install-recommends chromium"
    assert test == "make test"


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "text"),
    [*((browser, "") for browser in ("chromium", "chromium-browser", "google-chrome", "chrome")), ("id", "echo 1000")],
)
def test_ci_installs_nothing_where_there_is_a_browser_or_no_right(name: str, text: str, bare: Path, fake: Fake) -> None:
    fake(name, text)
    assert ci().returncode == 0
    assert (bare / "log").read_text() == "make test\n"


@pytest.mark.process
def test_ci_installs_nothing_without_apt(bare: Path) -> None:
    (bare / "bin" / "apt-get").unlink()
    assert ci().returncode == 0
    assert (bare / "log").read_text() == "make test\n"


@pytest.mark.process
def test_ci_says_in_one_line_that_chromium_is_missing(bare: Path, fake: Fake) -> None:
    fake("apt-get", "echo working; echo E: no network >&2; exit 100")
    done = ci()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: Chromium, which the page test needs, cannot be installed: E: no network\n"
    assert not (bare / "log").exists(), "tested without it"
