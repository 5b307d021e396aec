"""`make gpu-check` rehearsed: its real parts in their real order by a clock that stands still, cut at every moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check
from gpu import plan
from gpu.findings import Findings
from gpu.session import Part, conduct, work

BUDGET = 450.0
NETWORKS = "cifar32", "imagenet64"
ALL = plan.Options("cuda:0", NETWORKS, (1, 64, 256), plan.PRECISIONS)
FEW = plan.Options("cuda:0", NETWORKS[:1], (1,), ("fp16",))


class Cut(BaseException):
    """The end of a process, or of the whole machine."""


class Rehearsal:
    """A machine whose time is what findings take, and whose processes end at their limit."""

    def __init__(self, path: Path, options: plan.Options, seconds: Callable[[str], float] = lambda name: 5) -> None:
        self.path, self.seconds, self.now, self.limit = path, seconds, 0.0, 0.0
        self.tried: Counter[str] = Counter()
        self.order: list[str] = []
        self.late: dict[str, list[str]] = {}
        self.parts = [
            replace(part, findings={name: self._body(name) for name in part.findings}) for part in plan.parts(options)
        ]
        self.names = [name for part in self.parts for name in part.findings]

    def _body(self, name: str) -> Callable[[float], dict[str, Any]]:
        def body(left: float) -> dict[str, Any]:
            self.tried[name] += 1
            self.now += self.seconds(name)
            if self.now > self.limit:
                self.now = self.limit
                raise Cut
            return {"summary": name, "late": self.late.pop(name, [])}

        return body

    def start(self, part: Part, seconds: float) -> int | None:
        self.order.append(part.name)
        self.limit = self.now + seconds
        try:
            return work(part, Findings(self.path), seconds, lambda: self.now)
        except Cut:
            return None

    def call(self, budget: float = BUDGET) -> Findings:
        """One call of the check."""
        findings = Findings(self.path)
        findings.open_run({"gpu": {"name": "H"}})
        conduct(self.parts, findings, budget, self.start, lambda: self.now)
        return Findings(self.path)

    def done(self) -> set[str]:
        """Findings with a result."""
        return {name for name, each in Findings(self.path).content["findings"].items() if "result" in each}


def test_the_parts_come_in_the_order_of_their_worth(tmp_path: Path) -> None:
    machine = Rehearsal(tmp_path / "gpu.json", FEW, lambda name: 1)
    machine.call()
    wanted = ("bandwidth", "kernels", "ops", "torch", "onnxruntime", "tensorrt", "compiled", "sanitizer")
    assert gpu_check.PARTS == tuple(machine.order) == wanted
    assert machine.done() == set(machine.names)
    first = next(name for name in machine.names if name.startswith("torch "))
    assert first == "torch cifar32, fp16, batch 1"


@pytest.mark.parametrize("seed", range(20))
def test_a_call_ends_in_time_whatever_its_findings_take(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    machine = Rehearsal(tmp_path / "gpu.json", ALL, lambda name: float(rng.exponential(10 ** rng.integers(0, 4))))
    for call in range(1, 4):
        machine.call()
        assert machine.now <= call * BUDGET


def test_a_part_that_takes_for_ever_leaves_time_for_others(tmp_path: Path) -> None:
    machine = Rehearsal(tmp_path / "gpu.json", ALL, lambda name: 1e6 if name.startswith(("torch", "kernels")) else 3)
    findings = machine.call()
    assert {name for name in machine.names if name.startswith(("bandwidth", "ops"))} <= machine.done()
    assert "findings are left for the next call" in findings.content["skipped"]["kernels"]
    machine.call()
    torch = [name for name in machine.names if name.startswith("torch")]
    assert [machine.tried[name] for name in torch[:3]] == [1, 1, 0], "what was cut is tried again behind the others"


def test_cut_at_any_write_no_finding_is_lost_or_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is gone before the n-th replacement of the file, for every n; the next call completes the result."""
    replace_file, writes, cut_at = os.replace, 0, 0

    def replace_or_cut(draft: Any, path: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == cut_at:
            raise KeyboardInterrupt
        replace_file(draft, path)

    monkeypatch.setattr("gpu.findings.os.replace", replace_or_cut)
    Rehearsal(tmp_path / "0.json", FEW).call()
    total = writes
    assert total > 2 * len(Rehearsal(tmp_path / "0.json", FEW).names)
    for n in range(1, total + 1):
        writes, cut_at = 0, n
        machine = Rehearsal(tmp_path / f"{n}.json", FEW)
        with pytest.raises(KeyboardInterrupt):
            machine.call()
        before, tried = machine.done(), machine.tried.copy()
        cut_at = 0
        machine.call()
        assert machine.done() == set(machine.names)
        assert all(machine.tried[name] == tried[name] == 1 for name in before)
        assert sum(machine.tried.values()) <= len(machine.names) + 1


def test_what_a_compiler_was_late_for_is_tried_again_and_its_result_stays(tmp_path: Path) -> None:
    machine = Rehearsal(tmp_path / "gpu.json", FEW)
    name = "torch cifar32, fp16, batch 1"
    machine.late[name] = ["torch.compile"]
    machine.call()
    machine.seconds = lambda _: 1e6
    machine.call()
    assert machine.tried[name] == 2
    entry = Findings(machine.path).content["findings"][name]
    assert (entry["result"]["late"], entry["run"], entry["failed"]) == (["torch.compile"], 0, "cut short")
    machine.seconds = lambda _: 1
    machine.call()
    entry = Findings(machine.path).content["findings"][name]
    assert (entry["result"]["late"], entry["run"]) == ([], 2) and "failed" not in entry
    machine.call()
    assert machine.tried[name] == 3


def test_a_failure_or_a_crash_ends_its_process_and_no_other_finding(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    machine = Rehearsal(path, FEW, lambda name: 1)
    fails, crashes, slow = "kernels test_noise.py", "ops kernels/test_torch_ops.py", "compiled cifar32, fp16, batch 1"

    def fail(left: float) -> Any:
        raise RuntimeError("CUDA failed in cuLaunchKernel\nsticky")

    def time_out(left: float) -> Any:
        raise subprocess.TimeoutExpired(["pytest"], left)

    def crash(left: float) -> Any:
        raise Cut

    starts: list[str] = []

    def start(part: Part, seconds: float) -> int | None:
        starts.append(part.name)
        if part.name == "sanitizer":
            return 127  # before a finding is begun
        status = machine.start(part, seconds)
        return -11 if status is None else status

    machine.parts = [
        replace(part, findings=dict(part.findings) | {n: f for n, f in plants if n in part.findings})
        for part in machine.parts
        for plants in [[(fails, fail), (crashes, crash), (slow, time_out)]]
    ]
    findings = Findings(path)
    findings.open_run({"gpu": None})
    conduct(machine.parts, findings, BUDGET, start, lambda: machine.now)
    failures = Findings(path).failures
    sanitizer = {name for name in machine.names if name.startswith("sanitizer")}
    assert failures == {
        fails: "RuntimeError: CUDA failed in cuLaunchKernel",
        crashes: "the process ended with status -11",
        **dict.fromkeys(sanitizer, "the process ended with status 127"),
    }
    assert machine.done() == set(machine.names) - {fails, crashes, slow} - sanitizer
    assert starts.count("kernels") == 2, "an error of CUDA stays in its process"
    assert starts.count("sanitizer") == len(sanitizer)


def test_findings_of_two_gpus_do_not_meet(tmp_path: Path) -> None:
    Findings(tmp_path / "a.json").open_run({"gpu": {"name": "H"}})
    before = (tmp_path / "a.json").read_text()
    with pytest.raises(ValueError, match='has findings of several GPUs, "H" and null: name another -o'):
        Findings(tmp_path / "a.json").open_run({"gpu": None})
    assert (tmp_path / "a.json").read_text() == before


def wait_for_end(pid: str) -> None:
    """Wait until a process is gone, or a zombie that nobody has collected."""
    stat, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.01)


@pytest.mark.process
def test_a_child_is_killed_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    from gpu.session import start_child

    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60 if sys.argv[2] == 'slow' else 0); sys.exit(7)\n"
    )
    assert start_child(Part("slow", 1, 1, (), {}), 5, [str(program)]) is None
    wait_for_end((tmp_path / "pid").read_text())
    assert start_child(Part("quick", 1, 1, (), {}), 60, [str(program)]) == 7
    wait_for_end((tmp_path / "pid").read_text())


def test_the_result_is_readable_json(tmp_path: Path) -> None:
    Rehearsal(tmp_path / "gpu.json", FEW).call()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert set(content) == {"runs", "findings", "skipped"}
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.json"], "no drafts stay"


@pytest.mark.process
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """A call that is killed leaves nothing that writes into the next one's result."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = f"from gpu.session import *; start_child(Part('a', 1, 1, (), {{}}), 60, [{str(program)!r}])"
    paths = os.pathsep.join(map(str, (plan.ROOT, plan.ROOT / "benchmarks")))
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    end = time.monotonic() + 60
    while not (pid := (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    wait_for_end(str(pid))


def test_a_larger_budget_goes_round_the_parts_again(tmp_path: Path) -> None:
    machine = Rehearsal(tmp_path / "gpu.json", ALL, lambda name: 29)
    assert "bandwidth" in machine.call().content["skipped"]
    whole = Rehearsal(tmp_path / "whole.json", ALL, lambda name: 29)
    findings = whole.call(budget=24 * 3600)
    assert whole.done() == set(whole.names) and findings.content["skipped"] == {}
    assert max(whole.tried.values()) == 1
