"""Jobs: which shards there are, that their bytes depend on the job alone, and what happens to a folder."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exports
import kills
import numpy as np
import pytest
from numpy.typing import NDArray

import cm_runtime as cm
from cm_runtime import sampling
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.errors import DataError, EngineError, OutOfMemoryError, OutputError, RequestError
from cm_runtime.generation import job as jobs
from cm_runtime.generation.job import Job
from cm_runtime.request import Draw, sampling_request, split
from cm_runtime.sampling import labels_of

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.Files("boundary", tmp_path_factory).onnx


@pytest.fixture(scope="module")
def engine(model: Path) -> OrtBackend:
    return OrtBackend(model, options=EngineOptions(device="cpu", threads=1))


@pytest.fixture(scope="module")
def make_job(engine: OrtBackend, model: Path) -> Make:
    def make(
        count: int = 20, shard_size: int = 7, kind: Any = "npz", micro_batch: int = 3, threads: int = 1, **request: Any
    ) -> Job:
        chosen = sampling_request(engine.manifest, Draw(count=count, steps=1, micro_batch=micro_batch, **request))
        return Job.from_request(engine, chosen, model, jobs.Shards(kind, shard_size), threads)

    return make


def finished(engine: OrtBackend, job: Job, folder: Path, **options: Any) -> list[int]:
    """The shards that were drawn."""
    with jobs.open_folder(job, folder, **options) as todo:
        assert list(jobs.run(engine, job, folder, todo)) == todo
    return todo


def arrays(folder: Path) -> tuple[NDArray[Any], list[int]]:
    images, labels = [], []
    for path in sorted(folder.glob("shard-*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            images.append(shard["arr_0"])
            labels += shard["arr_1"].tolist()
    return np.concatenate(images), labels


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The images


@pytest.mark.process
@pytest.mark.parametrize("count", [1, 3, 7, 255])
@pytest.mark.parametrize("shard_size", [2, 100])
def test_shards_together_are_what_sample_draws(
    engine: OrtBackend, make_job: Make, tmp_path: Path, count: int, shard_size: int
) -> None:
    job = make_job(count, shard_size, micro_batch=4, seed=5, start=2, labels="random")
    finished(engine, job, tmp_path)
    images, labels = arrays(tmp_path)
    wanted = cm.sample(engine, count, 1, seed=5, start=2, labels="random")
    assert np.abs(images.astype(int) - wanted).max() <= 1
    index = np.arange(2, 2 + count, dtype=np.uint64)
    chosen = sampling_request(
        engine.manifest, Draw(count=count, steps=1, seed=5, start=2, labels="random", micro_batch=4)
    )
    expected = labels_of(chosen, index, exports.CLASSES)
    assert expected is not None and labels == expected.tolist()
    sizes = [jobs.size(job, number) for number in job.numbers]
    assert sum(sizes) == count and set(sizes[:-1]) <= {shard_size}


def test_floats_are_what_sample_draws(engine: OrtBackend, make_job: Make, tmp_path: Path) -> None:
    finished(engine, make_job(8, 5, micro_batch=5, output="float32"), tmp_path)
    images, _ = arrays(tmp_path)
    assert images.dtype == np.float32
    assert np.abs(images - cm.sample(engine, 8, 1, output="float32")).max() < 1e-5


@pytest.mark.parametrize("before_the_end", [1, 2, 5, 8, 20])
def test_the_last_indices_of_a_seed(engine: OrtBackend, make_job: Make, tmp_path: Path, before_the_end: int) -> None:
    """There are none after them to fill a micro-batch with."""
    start = 2**64 - before_the_end
    finished(engine, make_job(before_the_end, 3, micro_batch=1000, start=start), tmp_path / "alone")
    job = make_job(before_the_end, 3, start=start).model_copy(update={"micro_batch": 8})
    finished(engine, job, tmp_path / "filled")
    wanted = cm.sample(engine, before_the_end, 1, start=start)
    for name in ("alone", "filled"):
        images, labels = arrays(tmp_path / name)
        assert np.abs(images.astype(int) - wanted).max() <= 1
        assert labels == [i % exports.CLASSES for i in range(start, 2**64)]


def test_every_micro_batch_has_the_jobs_size(
    engine: OrtBackend, make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    evaluate = engine.evaluate

    def watched(feed: Any) -> Any:
        seen.append(len(feed["x"]))
        return evaluate(feed)

    monkeypatch.setattr(engine, "evaluate", watched)
    finished(engine, make_job(20, 7, micro_batch=3), tmp_path)
    assert seen == [3] * 8  # 7 = 3 + 3 + 1, twice, and 6 = 3 + 3


def test_an_engine_that_goes_on_with_smaller_micro_batches_is_stopped(
    engine: OrtBackend, make_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one on a GPU does when memory does not last: its bytes would be others."""

    def halving(chosen: Any, noise: Any = None) -> Iterator[sampling.Batch]:
        part = next(split(chosen, 1))
        yield sampling.Batch(np.array([part.start], np.uint64), None, np.zeros((1, 8, 8, 3), np.uint8))

    monkeypatch.setattr(engine, "batches", halving, raising=False)
    with pytest.raises(OutOfMemoryError, match="no memory for 3 images at once: give a smaller --micro-batch"):
        finished(engine, make_job(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [jobs.MANIFEST]


# Going on


@pytest.mark.process
@pytest.mark.parametrize("kind", ["npz", "png", "wds", "parquet"])
def test_only_what_is_missing_is_drawn_again_to_the_same_bytes(
    engine: OrtBackend, make_job: Make, tmp_path: Path, kind: str
) -> None:
    job = make_job(kind=kind)
    assert finished(engine, job, tmp_path) == [0, 1, 2]
    whole = contents(tmp_path)
    assert finished(engine, job, tmp_path) == []
    jobs.formats.remove(jobs.formats.path(tmp_path, job.format, 1))
    assert jobs.missing_shards(job, tmp_path) == [1]
    assert finished(engine, job, tmp_path) == [1]
    assert contents(tmp_path) == whole
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    listed = {line.split("  ")[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(whole) - {"manifest.json", "SHA256SUMS"}


@pytest.mark.process
def test_a_shard_is_the_same_alone_in_any_order_and_in_many_threads_at_once(
    engine: OrtBackend, make_job: Make, tmp_path: Path
) -> None:
    job = make_job(kind="png")
    finished(engine, job, tmp_path / "in order")
    other = tmp_path / "at once"
    other.mkdir()
    threads = [threading.Thread(target=jobs.make_shard, args=(engine, job, n, other)) for n in (2, 0, 1, 2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jobs.make_shard(engine, job, 1, other)
    before = contents(tmp_path / "in order")
    assert contents(other) == {name: content for name, content in before.items() if "/" in name}


def test_what_a_kill_left_behind_is_removed(engine: OrtBackend, make_job: Make, tmp_path: Path) -> None:
    (tmp_path / ".cm-0a1b2c3d").mkdir()
    (tmp_path / ".cm-0a1b2c3d" / "000000000.png").touch()
    (tmp_path / ".cm-4e5f6071.npz").mkdir()
    (tmp_path / "notes.txt").touch()
    finished(engine, make_job(3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "SHA256SUMS",
        "manifest.json",
        "notes.txt",
        "shard-000000.npz",
    ]


@pytest.mark.process
def test_a_full_disk_keeps_finished_shards_and_a_later_run_goes_on(
    engine: OrtBackend, make_job: Make, tmp_path: Path
) -> None:
    job = make_job(40, 7, kind="wds")
    finished(engine, job, tmp_path / "undisturbed")
    whole = {name: len(content) for name, content in contents(tmp_path / "undisturbed").items() if "shard" in name}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "full"
    with pytest.raises(OutputError, match=r"shard-000002.tar cannot be written: File too large"):  # noqa: SIM117
        with jobs.open_folder(job, folder) as todo:
            try:
                for number in jobs.run(engine, job, folder, todo):
                    if number == 1:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (min(whole.values()) // 2, hard))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(contents(folder)) == ["manifest.json", "shard-000000.tar", "shard-000001.tar"]
    assert finished(engine, job, folder) == [2, 3, 4, 5]
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_a_half_written_shard_is_named_and_left_alone(engine: OrtBackend, make_job: Make, tmp_path: Path) -> None:
    job = make_job()
    finished(engine, job, tmp_path)
    where = tmp_path / "shard-000001.npz"
    where.write_bytes(where.read_bytes()[:-9])
    before = contents(tmp_path)
    for attempt in (
        lambda: finished(engine, job, tmp_path),
        lambda: jobs.missing_shards(job, tmp_path),
        lambda: jobs.make_shard(engine, job, 1, tmp_path),
    ):
        with pytest.raises(DataError, match=r"shard-000001\.npz: is not the whole shard .*; remove it and run this"):
            attempt()
    assert contents(tmp_path) == before


# One folder, one job, one run


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 2}, "its seed is 0, not 2"),
        ({"start": 1}, "its start is 0, not 1"),
        ({"count": 19}, "its count is 20, not 19"),
        ({"shard_size": 8}, "its shard size is 7, not 8"),
        ({"micro_batch": 2}, "its micro batch is 3, not 2"),
        ({"labels": [1, 2]}, r"its labels are all, not \(1, 2\)"),
        ({"output": "float32"}, "its output is uint8, not float32"),
        (
            {"kind": "wds"},
            r"its format is npz, not wds, its versions are cm-runtime .*, not cm-runtime .*, pillow [\d.]+",
        ),
        ({"threads": 2}, "its threads are 1, not 2"),
        ({"seed": 2, "count": 21}, "its seed is 0, not 2, its count is 20, not 21"),
    ],
)
def test_a_folder_of_another_job_is_refused_and_replaced_if_forced(
    engine: OrtBackend, make_job: Make, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    finished(engine, make_job(), tmp_path)
    (tmp_path / "notes.txt").touch()
    before = contents(tmp_path)
    other = make_job(**change)
    with pytest.raises(OutputError, match=f"holds another job: {line}.*; give another folder, or --force"):
        finished(engine, other, tmp_path)
    assert contents(tmp_path) == before
    assert finished(engine, other, tmp_path, force=True) == list(other.numbers)
    assert jobs.load_job(tmp_path) == other
    assert "notes.txt" in contents(tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) == len(other.numbers)
    assert finished(engine, other, tmp_path, force=True) == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("manifest.json", "{}", "manifest.json: is no job of this version of cm-runtime"),
        ("manifest.json", "[1", "manifest.json: is no job of this version of cm-runtime"),
        ("shard-000007.npz", "", r"holds shards without their manifest\.json; give another folder"),
    ],
)
def test_a_folder_of_somebody_elses_is_left_alone(
    engine: OrtBackend, make_job: Make, tmp_path: Path, name: str, text: str, line: str
) -> None:
    (tmp_path / name).write_text(text)
    for force in (False, True):
        with pytest.raises((OutputError, DataError), match=line):
            finished(engine, make_job(), tmp_path, force=force)
    assert contents(tmp_path) == {name: text.encode()}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"count": 1 << 63, "shard_size": 1}, "9223372036854775808 shards are more than 1000000"),
        ({"count": 1 << 64, "shard_size": 1}, "18446744073709551616 shards are more than"),
        ({"count": 10**400}, "there is no such range as 1000"),
        ({"start": 1 << 64}, "there is no such range as 20 images from 18446744073709551616"),
        ({"shard_size": 10**300}, "a shard holds at most"),
        ({"labels": [0] * 300_000}, "300000 labels are more than"),
    ],
)
def test_a_manifest_of_any_numbers_is_one_line(
    make_job: Make, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    text = json.dumps(json.loads(make_job().model_dump_json()) | change)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=f"manifest.json: is no job of this version of cm-runtime .*{line}") as caught:
        jobs.load_job(tmp_path)
    assert len(str(caught.value)) <= 1007


@pytest.mark.parametrize("name", ["manifest.json", "manifest.next.json"])
@pytest.mark.parametrize("is_what", ["/dev/zero", "a pipe", "too large", "deep", "a loop", "a folder"])
def test_a_manifest_that_is_no_file_of_moderate_size_is_refused_before_it_is_read(
    engine: OrtBackend, make_job: Make, tmp_path: Path, is_what: str, name: str
) -> None:
    where = tmp_path / name
    if is_what == "/dev/zero":
        where.symlink_to("/dev/zero")
    elif is_what == "a pipe":
        os.mkfifo(where)
    elif is_what == "too large":
        where.write_bytes(bytes(10_000_000))
    elif is_what == "deep":
        where.write_text("[" * 1_000_000)
    elif is_what == "a loop":
        where.symlink_to(where)
    else:
        where.mkdir()
    with pytest.raises((DataError, OutputError), match=f"{name}[: ]") as caught:
        finished(engine, make_job(), tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_second_run_into_a_folder_is_refused_at_once(engine: OrtBackend, make_job: Make, tmp_path: Path) -> None:
    job = make_job()
    with jobs.open_folder(job, tmp_path) as todo:
        left = tmp_path / ".cm-0a1b2c3d.npz"
        left.mkdir()
        with pytest.raises(OutputError, match="another run is at work in it"), jobs.open_folder(job, tmp_path):
            pass
        assert left.exists()  # it may be what the first is writing
        for number in todo:
            jobs.make_shard(engine, job, number, tmp_path)
    assert finished(engine, job, tmp_path) == []


def test_the_manifest_is_the_job_and_nothing_of_the_run(engine: OrtBackend, make_job: Make, tmp_path: Path) -> None:
    job = make_job(seed=2**64 - 1, labels=[4, 0])
    finished(engine, job, tmp_path)
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert (told["seed"], told["labels"], told["micro_batch"], told["backend"]) == (2**64 - 1, [4, 0], 3, "ort")
    assert told["versions"][1].startswith("onnxruntime ")
    assert jobs.load_job(tmp_path) == job


# Growth


@pytest.mark.parametrize("kind", ["npz", "png", "wds", "parquet"])
@pytest.mark.parametrize(("counts", "drawn"), [((10, 12), [2]), ((8, 12), [2]), ((5, 6, 10), [1, 2])])
def test_a_folder_grows_to_the_bytes_of_one_that_had_the_size_from_the_start(
    engine: OrtBackend, make_job: Make, tmp_path: Path, kind: str, counts: tuple[int, ...], drawn: list[int]
) -> None:
    """Full shards stay as they are, and a last one that was not full is drawn again."""
    for count in counts[:-1]:
        finished(engine, make_job(count, 4, kind), tmp_path / "grown")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown").glob("shard-*")}
    job = make_job(counts[-1], 4, kind)
    assert finished(engine, job, tmp_path / "grown")[-len(drawn) :] == drawn
    full = [path for path in times if int(path.stem[-6:]) < counts[-2] // 4]
    assert all(path.stat().st_mtime_ns == times[path] for path in full)
    finished(engine, job, tmp_path / "fresh")
    assert contents(tmp_path / "grown") == contents(tmp_path / "fresh")
    with pytest.raises(OutputError, match=f"its count is {counts[-1]}, not {counts[0]}"):
        finished(engine, make_job(counts[0], 4, kind), tmp_path / "grown")


@pytest.mark.quick("npz")
@pytest.mark.process
@pytest.mark.parametrize("kind", ["npz", "png"])
def test_a_kill_during_growth_leaves_a_folder_that_either_command_completes(
    engine: OrtBackend, make_job: Make, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = small, _, large = [make_job(count, 2, kind, micro_batch=2) for count in (3, 4, 6)]
    parts = {(job.count, number): list(jobs.draw_shard(engine, job, number)) for job in every for number in job.numbers}
    monkeypatch.setattr(jobs, "draw_shard", lambda _, job, number: iter(parts[job.count, number]))  # no engine in forks
    whole = {}
    for job in every:
        finished(engine, job, tmp_path / f"{job.count}")
        whole[job.count] = contents(tmp_path / f"{job.count}")
    killed = kills.folders(tmp_path / "3", lambda each: finished(engine, large, each), tmp_path)
    for number, folder in enumerate(killed):
        for path in folder.glob("shard-*"):  # whole, as one of the two
            inside = {name: content for name, content in contents(folder).items() if name.startswith(path.name)}
            assert any(inside.items() <= whole[count].items() for count in (3, 6))
        then = every[number % 3] if jobs.load_job(folder) == small else large
        assert kills.runs(lambda each, then=then: finished(engine, then, each), folder)  # type: ignore[misc]
        assert contents(folder) == whole[then.count]
        assert not list(folder.glob(".cm-*"))


# What cannot be a job


def test_what_no_shards_can_hold_is_refused(make_job: Make) -> None:
    for options, line in (
        ({"kind": "wds", "output": "float32"}, "pictures hold bytes: --float is for --shards npz, not wds"),
        ({"count": 10**18}, "shards are more than 1000000; give a larger --shard-size"),
        ({"shard_size": 0}, "a shard holds at least 1 image, not 0"),
        ({"shard_size": 1 << 64}, "a shard holds at most 1000000000 images, not 18446744073709551616"),
        ({"count": (1 << 64) - 1, "shard_size": 1}, "18446744073709551615 shards are more than 1000000"),
        ({"count": 1 << 63, "start": 1 << 63, "shard_size": 1}, "9223372036854775808 shards are more than 1000000"),
        ({"labels": [0] * 300_000}, "300000 labels are more than 262144"),
    ):
        with pytest.raises(RequestError, match=line):
            make_job(**options)


def test_another_engine_than_the_jobs_is_refused(engine: OrtBackend, make_job: Make, tmp_path: Path) -> None:
    job = make_job()
    for change, line in (
        ({"backend": "torch"}, "its backend is torch, not ort"),
        ({"model_sha256": "0" * 64}, "its model sha256 is 000000000000, not"),
        ({"versions": ("onnxruntime 1.0",)}, "its versions are onnxruntime 1.0, not"),
    ):
        with pytest.raises(EngineError, match=f"does not make the bytes of the job: {line}"):
            jobs.make_shard(engine, job.model_copy(update=change), 0, tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    """A file's, or a folder's with its names."""
    seen = set()
    for name, text in (("a", "1"), ("a", "2"), ("b", "2")):
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        (folder / name).write_text(text)
        seen |= {jobs.identity(folder), jobs.identity(folder / name)}
    assert len(seen) == 5
    sums = "".join(f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in (("a", b"1"), ("b", b"2")))
    (tmp_path / "a1" / "b").write_bytes(b"2")
    assert jobs.identity(tmp_path / "a1") == hashlib.sha256(sums.encode()).hexdigest()  # `sha256sum * | sha256sum`
