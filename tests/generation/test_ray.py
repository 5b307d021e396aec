"""Workers of a Ray cluster make the shards that one process makes, also when one of them dies; and say why they cannot.

One cluster serves most tests here, which join it; the command line starts its own.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import exports
import pytest

from cm_runtime import backends
from cm_runtime.backends.base import Backend
from cm_runtime.errors import EngineError, MissingExtraError, RequestError
from cm_runtime.files.workspaces import TEMPORARY, sweep
from cm_runtime.generation import job as jobs
from cm_runtime.generation import ray_driver, ray_runner
from cm_runtime.generation.job import Job
from cm_runtime.request import Draw, sampling_request

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the cluster, which nobody joins without its token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # which reads them

        ray.init("local", include_dashboard=False, object_store_memory=ray_driver.OBJECT_STORE, log_to_driver=False)
        try:
            yield ray.get_runtime_context().gcs_address
            assert ray.cluster_resources()["CPU"] >= 1  # whoever joined left it as it was
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def engine() -> Backend:
    return backends.load(None, "ort", "cpu", 1)


def work(engine: Backend, count: int, shard_size: int) -> Job:
    chosen = sampling_request(engine.manifest, Draw(count=count, micro_batch=10))
    return Job.from_request(engine, chosen, backends.DEFAULT_MODEL, jobs.Shards("npz", shard_size), 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def job(engine: Backend) -> Job:
    return work(engine, 175, 30)


@pytest.fixture(scope="module")
def alone(engine: Backend, job: Job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the job."""
    folder = tmp_path_factory.mktemp("alone")
    for number in job.numbers:
        jobs.make_shard(engine, job, number, folder)
    return contents(folder)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def at_work() -> list[int]:
    """The workers of this program's cluster that have a shard in hand: by their titles, our grandchildren."""
    found = []
    for process in (int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            title = Path(f"/proc/{process}/cmdline").read_bytes()
            if title.startswith(b"ray::MapWorker") and b".submit" in title and parent(parent(process)) == os.getpid():
                found.append(process)
    return found


def one_at_work() -> int:
    while not (found := at_work()):
        time.sleep(0.01)
    return found[0]


@contextmanager
def dying_workers() -> Iterator[None]:
    """Every worker is killed in its first second or two."""
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            workers = at_work()
            time.sleep(1)
            for worker in workers:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_shards_are_those_of_one_process(
    address: str,
    job: Job,
    alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Byte for byte, in any order, also where they are more than Ray is told of at once; and Ray says nothing."""
    monkeypatch.setattr(ray_runner, "MOST_SHARDS", 4)
    assert sorted(ray_runner.run(None, job, tmp_path, list(job.numbers), address=address)) == list(job.numbers)
    assert contents(tmp_path) == alone
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_worker_that_dies_loses_nothing(
    address: str, job: Job, alone: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does it leave the file that it was writing."""
    run = ray_runner.run(None, job, tmp_path, list(job.numbers), address=address)
    made = [next(run)]
    os.kill(one_at_work(), signal.SIGKILL)
    made += run
    assert sorted(made) == list(job.numbers)
    assert contents(tmp_path) == alone
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run(
    address: str, engine: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with dying_workers(), pytest.raises(EngineError, match=r"^worker on \S+: 3 workers died over shard 0, ") as caught:
        list(ray_runner.run(None, work(engine, 20000, 20000), tmp_path, [0], address=address))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.quick("no folder")
@pytest.mark.parametrize(
    ("model", "folder", "changed", "line"),
    [
        ("no.onnx", ".", {}, "{here}/no.onnx: no such model"),
        pytest.param(
            *(None, "no", {}, "{here}/no/shard-00000[01].npz cannot be written: there is no folder {here}/no"),
            id="no folder",
        ),
        (
            None,
            ".",
            {"file_sha256": "0"},
            f"{backends.DEFAULT_MODEL} is another model here than where the job was given",
        ),
        (
            None,
            ".",
            {"versions": ("none 1.0",)},
            "this engine does not make the bytes of the job: its versions are none 1.0, not .*",
        ),
    ],
)
def test_a_worker_says_what_it_could_not_do(
    address: str,
    model: str | None,
    folder: str,
    changed: dict[str, str],
    line: str,
    job: Job,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = job.model_copy(update=changed)
    run = ray_runner.run(model and tmp_path / model, asked, tmp_path / folder, [0, 1], address=address)
    with pytest.raises(EngineError, match=f"^worker on {socket.gethostname()}: {line.format(here=tmp_path)}$"):
        list(run)
    assert contents(tmp_path) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.process
def test_the_command_line_joins_a_cluster(address: str, tmp_path: Path) -> None:
    """It makes what it makes without."""
    words = [
        "sample",
        "--count",
        30,
        "--shard-size",
        8,
        "--micro-batch",
        4,
        "--backend",
        "ort",
        "--threads",
        1,
        "--quiet",
    ]
    there = exports.command(*words, "-o", "there/", "--runner", "ray", "--ray-address", address, cwd=tmp_path)
    here = exports.command(*words, "-o", "here/", cwd=tmp_path)
    assert (there.returncode, there.stderr, here.returncode) == (0, "", 0)
    assert there.stdout == "there/: 30 images in 4 shards, 2 steps, seed 0\n"
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


# A cluster of its own


WORDS = [
    "--quiet",
    "--shard-size",
    20,
    "--micro-batch",
    4,
    "--backend",
    "ort",
    "--threads",
    1,
    "--runner",
    "ray",
    "-o",
    "out/",
]


def descendants(process: int) -> dict[int, str]:
    """Those of a process and their command lines."""
    found: dict[int, str] = {}
    parents = {}
    for each in (int(entry.name) for entry in Path("/proc").glob("[0-9]*")):
        with suppress(OSError):
            parents[each] = parent(each)
            found[each] = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    inside = {process}
    while more := {each for each, above in parents.items() if above in inside} - inside:
        inside |= more
    return {each: found[each] for each in inside - {process} if each in found}


def runs(process: int) -> bool:
    """And is no zombie that nobody has waited for."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(processes: Iterable[int], seconds: float = 60) -> bool:
    """Whether all have ended by then."""
    end = time.monotonic() + seconds
    while any(map(runs, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def on_its_own(folder: Path, count: int) -> Iterator[tuple[subprocess.Popen[str], dict[int, str]]]:
    """The command that draws ``count`` images on a cluster that it starts, when its first shard is there."""
    words = [sys.executable, "-m", "cm_runtime", "sample", "--count", count, *WORDS]
    with subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            while not (folder / "out" / "shard-000000.npz").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            yield process, descendants(process.pid)
        finally:
            process.kill()


@pytest.mark.slow
def test_the_command_line_starts_and_stops_a_cluster(tmp_path: Path) -> None:
    """Which says nothing and leaves nothing."""
    with on_its_own(tmp_path, 400) as (process, below):
        assert any("gcs_server" in line for line in below.values())
        said = process.communicate()
        assert (process.returncode, said) == (0, ("out/: 400 images in 20 shards, 2 steps, seed 0\n", ""))
        assert gone(below)
    assert not (tmp_path / ".ray").exists()


@pytest.mark.slow
def test_a_cluster_that_is_lost_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's compiled core ends its process then. What is finished stays."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "2")  # and not a minute
    with on_its_own(tmp_path, 100000) as (process, below):
        os.kill(next(each for each, line in below.items() if "gcs_server" in line), signal.SIGKILL)
        out, err = process.communicate()
        assert (process.returncode, out) == (1, "")
        assert re.fullmatch(r"error: Ray[^\n]+\n", err), err  # the words are of whatever missed it first
        assert gone(below)
    assert (tmp_path / "out" / "shard-000000.npz").exists()
    sweep(tmp_path / "out")  # as the next run does: a worker may have lived for longer than the command
    assert not list((tmp_path / "out").glob(f"{TEMPORARY}*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_takes_its_cluster_along(tmp_path: Path, number: signal.Signals) -> None:
    with on_its_own(tmp_path, 100000) as (process, below):
        process.send_signal(number)
        said = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert said == ("", "interrupted\n" if number == signal.SIGINT else "")
        assert gone(below)


def test_nothing_to_do_takes_no_cluster(job: Job, tmp_path: Path) -> None:
    assert list(ray_runner.run(None, job, tmp_path, [], address="nowhere")) == []


@pytest.mark.parametrize(
    ("device", "threads", "nodes", "shards", "taken", "workers"),
    [
        ("cpu", 1, [{"CPU": 2.0}], 9, {"num_cpus": 1}, 2),
        ("cpu", 1, [{"CPU": 8.0}], 3, {"num_cpus": 1}, 3),
        ("cpu", 3, [{"CPU": 8.0}, {"CPU": 4.0}, {"CPU": 2.0}], 9, {"num_cpus": 3}, 3),
        ("cpu", 64, [{"CPU": 8.0}, {"CPU": 4.0}], 9, {"num_cpus": 8}, 1),
        ("cpu", 0, [{"CPU": 8.0}, {}, {"CPU": 0.0}, {"CPU": 4.0}], 9, {"num_cpus": 4}, 2),
        ("cuda", 0, [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}, {"GPU": 1.0}], 9, {"num_gpus": 1}, 5),
        ("cuda", 2, [{"CPU": 8.0, "GPU": 4.0}], 2, {"num_gpus": 1}, 2),
    ],
)
def test_workers_share_the_cores_or_the_gpus(
    device: str, threads: int, nodes: list[dict[str, float]], shards: int, taken: dict[str, int], workers: int
) -> None:
    assert ray_driver.share(device, threads, nodes, shards) == (taken, workers)


@pytest.mark.parametrize(
    ("device", "nodes", "line"),
    [
        ("cuda", [{"CPU": 8.0}], "--device cuda:0: no node of the Ray cluster has a GPU"),
        ("cpu", [{}, {"CPU": 0.5}], "no node of the Ray cluster has a core to give"),
    ],
)
def test_a_cluster_may_lack_what_is_asked_for(device: str, nodes: list[dict[str, float]], line: str) -> None:
    with pytest.raises(EngineError, match=f"^{line}$"):
        ray_driver.share(device, 1, nodes, 1)


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "error", "line"),
    [
        ("127.0.0.1:PORT", EngineError, "no Ray cluster answers at 127.0.0.1:.*: Connection refused"),
        ("here.invalid:6379", EngineError, "no Ray cluster answers at here.invalid:6379: "),
        *[
            (text, RequestError, f"--ray-address takes the HOST:PORT of a cluster, or auto, not {text!r}")
            for text in ("", "here", "here:", ":1", "here:x", "here:65536", "ray://here:10001")
        ],
    ],
)
def test_an_address_without_a_cluster(
    address: str, error: type[Exception], line: str, job: Job, tmp_path: Path
) -> None:
    address = address.replace("PORT", str(unused_port()))
    began = time.perf_counter()
    with pytest.raises(error, match=line) as caught:
        next(ray_runner.run(None, job, tmp_path, [0], address=address))
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - began < 2 * ray_runner.PATIENCE


@pytest.mark.process
@pytest.mark.parametrize("package", ray_runner.PACKAGES)
def test_without_ray(package: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"^--runner ray needs {package}: pip install 'cm-runtime\[ray\]'$"):
        next(ray_runner.run(None, job, tmp_path, [0], address=None))
