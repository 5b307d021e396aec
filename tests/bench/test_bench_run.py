"""Whole runs, by the command and by the function: what is measured and refused, and what a bad end leaves."""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from exports import ROOT, Files, command, environment

from cm_runtime import backends, export
from cm_runtime.bench import compare, results, rounds
from cm_runtime.bench.contenders import Side
from cm_runtime.bench.report.environment import troubles as environment_of
from cm_runtime.bench.report.markdown import summary
from cm_runtime.bench.results import Result, Settings
from cm_runtime.bench.run import run
from cm_runtime.bench.scenario import Scenario, title
from cm_runtime.bench.worker import Facts
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import OutputError, RequestError

SLOW = """
import time
quick = sample
def sample(*arguments, **options):
    began = time.perf_counter()
    images = quick(*arguments, **options)
    time.sleep(0.5 * (time.perf_counter() - began))
    return images
"""
MORTAL = """
import os, signal
living, left = sample, [3]
def sample(*arguments, **options):
    left[0] -= 1
    return living(*arguments, **options) if left[0] else os.kill(os.getpid(), signal.SIGKILL)
"""
SMALL = Settings(budget_s=0.4, interval=0.5, quick=True, seed=0)


@pytest.fixture(autouse=True)
def _any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks take seconds, and have tests of their own; a busy machine starts slowly."""
    from cm_runtime.bench import peaks

    whole = peaks.measure_peaks
    monkeypatch.setattr(rounds, "QUICK_START", 60.0)
    monkeypatch.setattr(peaks, "measure_peaks", lambda *place: whole(*place, size=512, seconds=0.01))


def one(**options: Any) -> Scenario:
    """A scenario that leaves a core to the tests beside it, and need not find the faster engine first."""
    return Scenario(**{"threads": 1, "backend": "ort", **options})


def measured(tmp_path: Path, *scenarios: Scenario, **options: Any) -> Result:
    return run(scenarios, tmp_path / "bench.json", options.pop("settings", SMALL), **options)


def bench(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return command("bench", *words, cwd=cwd)


@pytest.mark.process
def test_what_a_run_holds(tmp_path: Path) -> None:
    """Single-stream and offline: every number is there, and follows from the samples beside it."""
    told: list[tuple[float, str]] = []
    scenarios = [Scenario(steps=1, batch=3), one(kind="offline", batch=7, backend="openvino")]
    found = measured(tmp_path, *scenarios, tell=lambda done, doing: told.append((done, doing)), command="x")
    assert found == results.read(tmp_path / "bench.json")
    jsonschema.validate(json.loads((tmp_path / "bench.json").read_text()), json.loads(results.SCHEMA.read_text()))
    assert found.complete and found.conditions is not None and found.samples is not None
    assert {(each.threads, each.device) for each in found.peaks} == {(2, "cpu"), (1, "cpu")} or len(found.peaks) == 1
    raw = (tmp_path / found.samples.file).read_bytes()
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (found.samples.bytes, found.samples.sha256)
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [each.engine and each.engine.split()[0] for each in found.scenarios] == ["onnxruntime", "openvino"]
    for scenario, asked in zip(found.scenarios, scenarios, strict=True):
        (subject,) = scenario.contenders
        assert scenario.name == asked.name and scenario.status == subject.status == "measured"
        blocks = [np.array(line["ns"]) / 1e6 for line in lines if line["scenario"] == scenario.name]
        assert subject.latency is not None and subject.images_per_s is not None
        assert subject.latency.samples == sum(map(len, blocks)) and subject.latency.blocks == len(blocks) >= 3
        assert subject.latency.p50.value == pytest.approx(np.median(np.concatenate(blocks)))
        assert subject.block_ms == pytest.approx([np.median(block) for block in blocks])
        inside = sum(line["network_ns"] for line in lines if line["scenario"] == scenario.name)
        assert subject.outside_network == pytest.approx(1 - inside / sum(map(np.sum, blocks)) / 1e6)
        assert 0 < subject.outside_network < 0.5
        assert scenario.facts is not None and scenario.facts.gflop == pytest.approx(0.533, rel=0.01)
        work = scenario.facts.gflop * asked.steps * asked.batch
        assert subject.gflop_per_s == pytest.approx(work / subject.latency.p50.value * 1e3)
        (peak,) = (each.matrix_gflop_per_s for each in found.peaks if each.threads == scenario.threads)
        assert subject.peak_fraction == pytest.approx(subject.gflop_per_s / peak.value)
        assert subject.agreement is not None and subject.agreement.against == "torch"
        assert subject.agreement.max_abs < 1e-4 and subject.agreement.grey_levels == 0
        # Each in a process of its own: a start may be quicker than the load was, on a machine with other work.
        assert len(subject.cold_start_s) == 3
        assert all(0.01 < seconds < 60 for seconds in (*subject.cold_start_s, subject.load_s))  # type: ignore[operator]
        assert 30e6 < subject.peak_host_bytes < 2e9  # type: ignore[operator]
        assert subject.micro_batch == asked.batch and subject.warmup >= 1
    single, offline = (each.contenders[0] for each in found.scenarios)
    assert single.images_per_s.value == pytest.approx(3e3 / single.latency.p50.value)  # type: ignore[union-attr]
    assert offline.images_per_s.value == pytest.approx(7e3 / offline.latency.p50.value, rel=0.5)  # type: ignore[union-attr]
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] == 2


@pytest.mark.process
def test_a_server_with_too_little_time_draws_what_waits_together(tmp_path: Path, files: Files) -> None:
    """Latency counts from the arrival."""
    slow = one(model=str(files.onnx), kind="server", batch=4, rate=20_000.0, bound_ms=1.0)
    (overloaded,) = measured(tmp_path, slow).scenarios[0].contenders
    assert overloaded.served is not None
    assert not overloaded.served.met and overloaded.served.mean_batch > 3  # 40 arrive in 2 ms; a queue forms
    lines = [json.loads(line) for line in (tmp_path / "bench.samples.jsonl").read_text().splitlines()]
    assert all(sum(line["batches"]) == len(line["ns"]) == 40 for line in lines)
    queued = [line["ns"][-1] / line["ns"][0] for line in lines]
    assert np.median(queued) > 3  # the last waited for the others


@pytest.mark.slow
def test_a_server_with_time_answers_each_by_itself(tmp_path: Path, files: Files) -> None:
    easy = one(model=str(files.onnx), kind="server", batch=4, rate=150.0, bound_ms=10_000.0)
    (served,) = measured(tmp_path, easy).scenarios[0].contenders
    assert served.served is not None
    assert served.latency is not None and served.latency.samples >= 800
    assert served.served.met == (served.latency.p99 is not None)  # a machine with other work may never tell
    assert served.served.mean_batch < 3


@pytest.mark.slow
def test_two_builds_take_turns(tmp_path: Path) -> None:
    """A planted slow-down of a half is found; the same tree twice is not one."""
    root = tmp_path / "slow"
    shutil.copytree(ROOT / "cm_runtime", root / "cm_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "cm_runtime" / "generation" / "stream.py").open("a") as file:
        file.write(SLOW)
    settings = SMALL.model_copy(update={"budget_s": 2.0, "interval": 0.0})
    found = measured(tmp_path, one(batch=1), against=str(root), settings=settings)
    base = found.scenarios[0].contender("base")
    assert base is not None and base.time_ratio is not None and base.agreement is not None
    assert base.agreement.against == "cm-runtime" and base.agreement.max_abs == 0
    assert 1.2 < base.time_ratio.value < 2
    assert base.latency is not None and len(base.block_ms) == len(found.scenarios[0].contenders[0].block_ms) >= 8


@pytest.mark.slow
def test_it_stops_once_it_knows_enough(tmp_path: Path, files: Files) -> None:
    settings = Settings(budget_s=1000, interval=0.9, quick=False, seed=0)
    (found,) = measured(tmp_path, one(model=str(files.onnx)), settings=settings).scenarios
    assert len(found.contenders[0].block_ms) == 16


@pytest.mark.slow
def test_a_contender_that_dies_is_told_of(tmp_path: Path, files: Files) -> None:
    """As the kernel ends a process for want of memory: the base is out, and the subject is measured."""
    root = tmp_path / "mortal"
    shutil.copytree(ROOT / "cm_runtime", root / "cm_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "cm_runtime" / "generation" / "stream.py").open("a") as file:
        file.write(MORTAL)
    (found,) = measured(tmp_path, one(model=str(files.onnx)), against=str(root)).scenarios
    subject, base = found.contenders
    assert subject.status == "measured" and len(subject.block_ms) >= 3
    assert base.status == "failed" and base.latency is None
    assert "SIGKILL; was there too little memory?" in base.reason


@pytest.mark.slow
def test_a_model_file_as_base(tmp_path: Path, files: Files) -> None:
    found = measured(tmp_path, one(model=str(files.onnx)), against=str(files.inline))
    base = found.scenarios[0].contender("base")
    assert base is not None and base.status == "measured"
    assert base.model_sha256 != found.scenarios[0].contenders[0].model_sha256


@pytest.mark.slow
def test_a_base_that_draws_other_images_is_not_timed(tmp_path: Path, files: Files) -> None:
    found = measured(tmp_path, one(model=str(files.onnx)), against=str(backends.DEFAULT_MODEL))
    base = found.scenarios[0].contender("base")
    assert base is not None and base.status == "failed" and "images are" in base.reason and base.latency is None


@pytest.mark.slow
def test_a_base_that_draws_other_images_may_be_timed_and_the_difference_is_told(tmp_path: Path, files: Files) -> None:
    weights = onnx.load(files.onnx)
    for tensor in weights.graph.initializer:
        if tensor.name == "F.out.2.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 3, tensor.name))
    onnx.save(weights, tmp_path / "other.onnx")
    how = {"settings": SMALL.model_copy(update={"allow_different_images": True})}
    found = measured(tmp_path, one(model=str(files.onnx)), against=str(tmp_path / "other.onnx"), **how)
    base = found.scenarios[0].contender("base")
    assert base is not None and base.status == "measured" and base.agreement is not None and base.agreement.is_allowed
    assert base.agreement.max_abs > 0.01 and base.time_ratio is not None
    levels = f"images differ by {base.agreement.max_abs:.2g} ({base.agreement.grey_levels} of 255 grey levels)"
    (verdict,) = compare.compare_builds(found, 0.05)
    assert levels in verdict.reason
    assert any(levels in trouble for trouble in environment_of(found)) and levels in summary(found).replace("\\", "")


@pytest.mark.parametrize("apart", [0.0039, 0.0078, 0.012])
@pytest.mark.parametrize(("subject", "base"), [(True, False), (False, True), (True, True), (False, False)])
def test_bytes_are_held_to_one_grey_level_on_either_side(subject: bool, base: bool, apart: float) -> None:
    def side(role: Any, value: float, is_quantised: bool) -> Side:
        images = np.full((2, 1, 1, 1), value, np.float32)
        spec: Any = SimpleNamespace(precision="auto")  # all that a comparison reads
        return Side(role, role, spec, facts=Facts("cpu", "", 1, False, is_quantised), images=images)

    first, second = side("subject", 0.1, subject), side("base", 0.1 + apart, base)
    rounds._compare(second, first.images, "subject", first.is_quantised)
    assert (second.error is None) == ((subject or base) and apart < 0.01)
    allowed = side("base", 0.1 + apart, base)
    rounds._compare(allowed, first.images, "subject", first.is_quantised, is_allowed=True)
    assert allowed.error is None and allowed.agreement is not None
    assert allowed.agreement.is_allowed == (second.error is not None)


@pytest.mark.parametrize(
    ("precision", "apart", "agrees"),
    [
        ("fp32", 0.0009, True),
        ("fp32", 0.0015, False),  # as much as TF32 changes images
        ("tf32", 0.0078, True),
        ("tf32", 0.012, False),
        ("bf16", 0.019, True),  # 40 dB on [-1, 1] are 0.02
        ("fp16", 0.021, False),
    ],
)
def test_images_are_held_to_what_their_precision_can_keep(precision: str, apart: float, agrees: bool) -> None:
    spec: Any = SimpleNamespace(precision=precision)
    images = np.full((2, 8, 8, 3), 0.1 + apart, np.float32)
    side = Side("subject", "subject", spec, facts=Facts("cpu", "", 1, False), images=images)
    rounds._compare(side, np.full((2, 8, 8, 3), 0.1, np.float32), "torch")
    assert (side.error is None) == agrees


@pytest.mark.slow
def test_a_checkpoint_is_exported_and_its_peers_agree(tmp_path: Path, files: Files) -> None:
    scenario = one(model=str(files.checkpoint), batch=3, peers=("diffusers", "torch", "onnx"))
    (found,) = measured(tmp_path, scenario).scenarios
    assert found.facts is not None and found.facts.export_s is not None and found.facts.export_s > 0
    assert found.facts.path == str(files.checkpoint)
    subject, diffusers, torch, plain = found.contenders
    assert subject.agreement is not None and subject.agreement.against == "torch"
    for peer in (diffusers, torch, plain):
        assert peer.status == "measured" and peer.agreement is not None and peer.time_ratio is not None, peer
        assert peer.agreement.against == "cm-runtime" and peer.agreement.max_abs < 1e-3
        assert peer.gflop_per_s is not None and peer.outside_network is None


@pytest.mark.slow
def test_torch_as_the_engine(tmp_path: Path, files: Files) -> None:
    (found,) = measured(tmp_path, one(model=str(files.checkpoint), backend="torch")).scenarios
    assert found.status == "measured" and found.facts is not None
    assert found.facts.export_s is None and found.facts.gflop is None
    assert found.contenders[0].gflop_per_s is None and found.contenders[0].outside_network is not None


@pytest.mark.process
def test_a_tiny_model_that_fails_parity_is_not_timed(tmp_path: Path, files: Files) -> None:
    """An export that records its network, without which there is no reference, and another sigma_data."""
    checkpoint = read_checkpoint(files.checkpoint)
    network = checkpoint.config.network.model_dump(mode="json")
    training = checkpoint.training.model_copy(update={"config": {"network": network}})
    export.onnx(replace(checkpoint, training=training), tmp_path / "right.onnx")
    graph = onnx.load(tmp_path / "right.onnx")
    (node,) = (each for each in graph.graph.node if each.op_type == "SkipScale")
    (attribute,) = (each for each in node.attribute if each.name == "sigma_data")
    attribute.f = 0.7
    onnx.save(graph, tmp_path / "wrong.onnx")
    (wrong,) = measured(tmp_path, one(model=str(tmp_path / "wrong.onnx"))).scenarios
    assert wrong.status == "failed" and "differ from those of torch" in wrong.reason and not wrong.contenders


@pytest.mark.slow
def test_a_model_that_fails_parity_is_not_timed(tmp_path: Path) -> None:
    """The bundled model with another sigma_data in its skip-scaling: finite images, but not the network's."""
    graph = onnx.load(backends.DEFAULT_MODEL)
    (node,) = (each for each in graph.graph.node if each.op_type == "SkipScale")
    (attribute,) = (each for each in node.attribute if each.name == "sigma_data")
    attribute.f = 0.7
    onnx.save(graph, tmp_path / "wrong.onnx")
    scenarios = one(model=str(tmp_path / "wrong.onnx"), peers=("onnx",)), one()
    wrong, right = measured(tmp_path, *scenarios).scenarios
    assert wrong.status == "failed" and "differ from those of torch" in wrong.reason and not wrong.contenders
    assert right.status == "measured"
    assert "wrong.onnx" not in (tmp_path / "bench.samples.jsonl").read_text()
    done = bench("run", "wrong.onnx", "--budget", "0.3", "--scenario", "* 1x1", "--quiet", "-o", "x.json", cwd=tmp_path)
    assert done.returncode == 1 and "differ from those of torch" in done.stdout
    assert done.stderr.count("\n") == 1 and "1 of 1 scenario could not be measured" in done.stderr


@pytest.mark.slow
def test_a_missing_peer_is_named(tmp_path: Path) -> None:
    words = ("run", "--threads", "1", "--peers", "onnx,torch", "--budget", "0.3")
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text("import sys\nsys.modules['torch'] = None\n")
    (tmp_path / "x").mkdir()
    env = {**environment(), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    call = [sys.executable, "-m", "cm_runtime", "bench", *words, "-o", "x/bench.json"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (found,) = results.read(tmp_path / "x" / "bench.json").scenarios
    assert [each.status for each in found.contenders] == ["measured", "absent", "absent"]
    assert all("torch" in each.reason for each in found.contenders)
    assert found.contenders[0].agreement is None and "not compared with torch" in found.contenders[0].reason


@pytest.mark.slow
def test_a_killed_run_leaves_what_it_finished(tmp_path: Path) -> None:
    words = ["run", "--steps", "1,2", "--threads", "1", "--budget", "0.5", "-o", "bench.json"]
    call = [sys.executable, "-m", "cm_runtime", "bench", *words]
    running = subprocess.Popen(call, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 100
    while not (tmp_path / "bench.json").exists():
        assert time.monotonic() < ends and running.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.send_signal(signal.SIGKILL)
    running.wait()
    found = results.read(tmp_path / "bench.json")
    assert not found.complete and len(found.scenarios) == 1 and found.samples is not None
    raw = (tmp_path / found.samples.file).read_bytes()[: found.samples.bytes]
    assert hashlib.sha256(raw).hexdigest() == found.samples.sha256
    while any(Path(f"/proc/{child}").exists() for child in children):  # they end with the one that conducts them
        assert time.monotonic() < ends
        time.sleep(0.02)
    done = bench("compare", "bench.json", "bench.json", cwd=tmp_path)
    assert done.returncode in (0, 4) and title(found.scenarios[0].name) in done.stdout
    assert bench(*words, cwd=tmp_path).stderr == "error: bench.json exists; replace it with --force\n"
    assert bench(*words, "--steps", "1", "--force", cwd=tmp_path).returncode == 0
    assert results.read(tmp_path / "bench.json").complete


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """The samples do not fit: one line, and the result of before is what it was."""
    first = measured(tmp_path, one())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written"):
            measured(tmp_path, one(), force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results.read(tmp_path / "bench.json") == first
    assert not list(tmp_path.glob(".cm-*"))


@pytest.mark.process
def test_two_runs_into_one_file(tmp_path: Path) -> None:
    with (tmp_path / "bench.samples.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="being written by another run"):
            measured(tmp_path, one())
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(OutputError, match="exists; replace it with --force"):
        measured(tmp_path, one())


@pytest.mark.process
def test_models_that_are_not_there_or_not_models(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    scenarios = [one(model=str(tmp_path / name)) for name in ("nothing.onnx", "x.onnx")]
    missing, damaged = measured(tmp_path, *scenarios).scenarios
    assert "no such model" in missing.reason and "not an ONNX file" in damaged.reason
    with pytest.raises(RequestError, match="nor a git revision"):
        run([one()], tmp_path / "y.json", SMALL, against="no-such-revision")


@pytest.mark.process
@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--suite", "quick", "--steps", "2"], "leave out --steps"),
        (["x.onnx", "--suite", "quick"], "leave out MODEL"),
        (["--suite", "nothing"], "there is no suite nothing"),
        (["--scenario", "nothing*"], "no scenario is called 'nothing*'"),
        (["--steps", "two"], "--steps takes whole numbers"),
        (["--steps", "0"], "steps"),
        (["--peers", "mine"], "peers"),
        (["--backend", "ort,tpu"], "backends"),
        (["--kind", "server"], "--rate and --bound"),
        (["--rate", "3"], "--rate and --bound"),
        (["--budget", "0"], "--budget"),
        (["--interval", "wide"], "--interval takes a percentage"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--seed", "-1"], "seed"),
        (["-o", "missing/x.json"], "no folder missing"),
        (["-o", "x.html"], "ends in .json"),
        (["--against", "HEAD~100000"], "nor a git revision"),
        (["--allow-different-images"], "--allow-different-images is for --against"),
    ],
)
def test_bad_requests(cli: Callable[..., Any], words: list[str], wrong: str) -> None:
    outcome = cli("bench", "run", *words)
    assert outcome.code == 1 and wrong in outcome.err and outcome.err.count("\n") == 1, outcome.err


@pytest.mark.process
def test_compare_exit_status(cli: Callable[..., Any], tmp_path: Path) -> None:
    """0, 3 and 4 from files; 1 for what cannot be compared; 2 for usage."""
    from bench import example_results

    def write(name: str, *blocks: float) -> None:
        results.write(
            example_results.result(
                example_results.scenario(2, 8, example_results.subject(10.0, 8, block_ms=blocks * 10))
            ),
            tmp_path / name,
        )

    write("base.json", 10.0, 10.1)
    write("slow.json", 11.0, 11.1)
    write("wild.json", 8.0, 13.0)
    for new, gate, status, word in (
        ("base.json", "5%", 0, "PASS"),
        ("slow.json", "5%", 3, "REGRESSION"),
        ("slow.json", "20", 0, "PASS"),
        ("wild.json", "5%", 4, "INCONCLUSIVE"),
    ):
        done = cli("bench", "compare", "base.json", new, "--fail-above", gate)
        assert done.code == status and done.out.splitlines()[-1].startswith(word), done.out + done.err
    for words in (["base.json"], ["base.json", "no.json"], ["base.json", "base.json", "--fail-above", "much"]):
        done = cli("bench", "compare", *words)
        assert done.code == 1 and done.err.count("\n") == 1, words
    assert cli("bench", "compare").code == 2
