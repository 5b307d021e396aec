"""`cm.stream`: the images of `cm.sample`, without end, from another thread, and for torch's DataLoader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import cm_runtime as cm
from cm_runtime import backends
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.errors import CmRuntimeError, MissingExtraError, RequestError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.Files("boundary", tmp_path_factory).onnx


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.Files("edm", tmp_path_factory).onnx


@pytest.fixture(scope="module")
def engine(path: Path) -> OrtBackend:
    return OrtBackend(path, options=EngineOptions(device="cpu", threads=1))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_batches_are_what_sample_draws(engine: OrtBackend) -> None:
    batches = list(cm.stream(engine, 20, 3, start=5, micro_batch=8, steps=1, labels=[4, 0, 1]))
    assert [len(batch.index) for batch in batches] == [8, 8, 4]
    assert np.concatenate([batch.index for batch in batches]).tolist() == list(range(5, 25))
    assert all(batch.labels is not None for batch in batches)
    assert [int(label) for batch in batches for label in batch.labels] == [[4, 0, 1][i % 3] for i in range(5, 25)]  # type: ignore[union-attr]
    images = np.concatenate([batch.images for batch in batches])
    wanted = cm.sample(engine, 20, 1, seed=3, start=5, micro_batch=8, labels=[4, 0, 1])
    assert images.dtype == np.uint8 and np.array_equal(images, wanted)


def test_a_mapping_of_labels_ends_a_stream(engine: OrtBackend) -> None:
    batches = list(cm.stream(engine, start=3, micro_batch=4, steps=1, labels={4: 3, 1: 2}))
    assert [int(label) for batch in batches for label in batch.labels] == [4, 4, 4, 1, 1]  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="labels are for 5 images, but 6 are asked for"):
        cm.stream(engine, 6, labels={4: 3, 1: 2})


@pytest.mark.process
def test_sample_opens_a_path_and_by_default_the_bundled_model(
    path: Path, engine: OrtBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backends, "load", lambda where: OrtBackend(where, options=EngineOptions(device="cpu", threads=1))
    )
    wanted = cm.sample(engine, 2, 1)
    for model in (path, str(path)):
        assert np.array_equal(cm.sample(model, 2, 1), wanted)
    assert cm.sample(count=1, steps=1).shape == (1, 28, 28, 1)


def test_what_is_no_model_is_refused_in_a_line() -> None:
    for model in (3, object(), torch.nn.Identity(), [1], b"m.onnx"):
        for use in (cm.sample, cm.stream, cm.load):
            with pytest.raises(
                RequestError, match=r"the path of (one|a model), or None for the bundled one, not"
            ) as caught:
                use(model)  # type: ignore[operator]
            assert "\n" not in str(caught.value)


def test_every_option_arrives(engine: OrtBackend) -> None:
    usual = next(iter(cm.stream(engine, micro_batch=3)))
    changes: list[dict[str, Any]] = [{"seed": 1}, {"start": 9}, {"steps": 1}, {"sigmas": (80.0, 1.0)}, {"labels": 4}]
    for change in [*changes, {"output": "float32"}]:
        assert not np.array_equal(next(iter(cm.stream(engine, micro_batch=3, **change))).images, usual.images), change
    floats: dict[str, Any] = {"micro_batch": 3, "output": "float32", "sigmas": (80.0, 0.5)}
    clipped, free = (next(iter(cm.stream(engine, clip=clip, **floats))).images for clip in (True, False))
    assert np.array_equal(clipped, np.clip(free, -1, 1)) and not np.array_equal(clipped, free)


def test_a_stream_begins_anew_each_time_and_has_no_end(engine: OrtBackend) -> None:
    stream = cm.stream(engine, micro_batch=2, steps=1)
    first, again = ([batch.index.tolist() for batch in islice(stream, 40)] for _ in range(2))
    assert first == again == [[2 * n, 2 * n + 1] for n in range(40)]
    last = list(cm.stream(engine, micro_batch=2, steps=1, start=2**64 - 3))
    assert [int(index) for batch in last for index in batch.index] == [2**64 - 3, 2**64 - 2, 2**64 - 1]


def test_a_reader_that_stops_leaves_no_thread(engine: OrtBackend) -> None:
    for batch in cm.stream(engine, micro_batch=2):
        assert batch.index.tolist() == [0, 1]
        assert len(threads()) == 1
        break
    assert threads() == []


@pytest.mark.process
def test_no_more_batches_are_drawn_than_prefetched(engine: OrtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    evaluate = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda feed: drawn.append(1) or evaluate(feed))
    batches = iter(cm.stream(engine, micro_batch=2, steps=1, prefetch=3))
    next(batches)
    time.sleep(0.5)
    assert len(drawn) == 4
    del batches


def test_errors_of_the_thread_come_to_the_reader(engine: OrtBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = iter(cm.stream(engine, micro_batch=2, steps=1, prefetch=1))
    next(batches)

    def fail(feed: Any) -> Any:
        raise cm.errors.EngineError("the engine is gone")

    monkeypatch.setattr(engine, "evaluate", fail)
    with pytest.raises(cm.errors.EngineError, match="the engine is gone"):
        list(batches)
    assert threads() == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"count": 0}, "count must be at least 1"),
        ({"steps": 0}, "steps must be from 1 to 1000"),
        ({"labels": 5}, "from 0 to 4, not 5"),
        ({"seed": -1}, "seed must be from 0"),
        ({"micro_batch": 0}, "micro-batch must be from 1"),
        ({"prefetch": 0}, "prefetch must be at least 1, not 0"),
    ],
)
def test_a_wrong_request_is_refused_at_once(engine: OrtBackend, path: Path, options: dict[str, Any], line: str) -> None:
    for model in (engine, path):
        with pytest.raises(RequestError, match=line):
            cm.stream(model, **options)


@pytest.mark.process
def test_ctrl_c_ends_a_program_that_reads_a_stream(path: Path, tmp_path: Path) -> None:
    script = (
        "import sys, cm_runtime as cm\n"
        "for batch in cm.stream(sys.argv[1], micro_batch=4):\n    print(batch.index[0], flush=True)\n"
    )
    words = [sys.executable, "-c", script, str(path)]
    running = subprocess.Popen(
        words, cwd=tmp_path, env=exports.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    try:
        assert running.stdout.readline() == "0\n"
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == -signal.SIGINT
    assert error.rstrip().endswith("KeyboardInterrupt")


# torch


@pytest.mark.process
def test_items_are_an_image_and_its_label(engine: OrtBackend, grey: Path) -> None:
    items = list(cm.stream(engine, 5, steps=1, micro_batch=2).dataset())
    images = cm.sample(engine, 5, 1, micro_batch=2)
    assert [label for _, label in items] == [0, 1, 2, 3, 4]
    assert all(image.dtype == torch.uint8 and image.is_contiguous() for image, _ in items)
    assert np.array_equal(torch.stack([image for image, _ in items]).permute(0, 2, 3, 1).numpy(), images)
    (one,) = cm.stream(grey, 1, output="float32").dataset()
    assert (one.dtype, one.shape) == (torch.float32, (1, 8, 8))


LOAD = """
import sys
import numpy as np
import cm_runtime as cm
from torch.utils.data import DataLoader

if __name__ == "__main__":
    path, before, workers, target, *context = sys.argv[1:]
    if before:
        cm.sample(cm.load(path, before), 2)
    dataset = cm.stream(path, 23, 7, steps=1, micro_batch=4).dataset()
    how = {"multiprocessing_context": context[0]} if context else {}
    loaded = list(DataLoader(dataset, batch_size=5, num_workers=int(workers), timeout=60, **how))
    images, labels = (np.concatenate(each) for each in zip(*loaded))
    np.savez(target, images=images, labels=labels)
"""


@pytest.mark.process
@pytest.mark.quick("openvino-1-context2")
@pytest.mark.parametrize(
    ("before", "workers", "context"), [("", 3, []), ("ort", 1, []), ("openvino", 1, []), ("openvino", 2, ["spawn"])]
)
def test_workers_share_the_images(
    path: Path, engine: OrtBackend, tmp_path: Path, before: str, workers: int, context: list[str]
) -> None:
    """Together each image once, in batches of the loader's own size, whatever was at work before they began."""
    (tmp_path / "load.py").write_text(LOAD)
    start = [sys.executable, "-W", "ignore", "load.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no choice of an engine is remembered
        done = exports.command(path, before, workers, "x.npz", *context, cwd=tmp_path, start=start)
    assert done.returncode == 0, done.stderr
    assert ("auto does without openvino" in done.stderr) == (before == "openvino" and not context)
    with np.load(tmp_path / "x.npz") as loaded:
        images, labels = loaded["images"].transpose(0, 2, 3, 1).astype(int), loaded["labels"].tolist()
    wanted = cm.sample(engine, 23, 1, seed=7, micro_batch=4)
    index = [int(np.abs(wanted - image).max(axis=(1, 2, 3)).argmin()) for image in images]
    assert sorted(index) == list(range(23))
    assert np.abs(wanted[index] - images).max() <= 1
    assert labels == [i % exports.CLASSES for i in index]


@pytest.mark.process
def test_a_loaded_model_does_not_go_to_workers(engine: OrtBackend) -> None:
    loader = DataLoader(cm.stream(engine, 4).dataset(), num_workers=1, timeout=60)
    with pytest.raises(RequestError, match="a loaded model cannot go to worker processes: give stream its path") as one:
        list(loader)
    assert "\n" not in str(one.value)


@pytest.mark.process
def test_without_torch_a_dataset_is_an_extra(path: Path, tmp_path: Path) -> None:
    hide = exports.hiding("torch")[2].rpartition("from cm_runtime.cli")[0]
    script = (
        f"{hide}\nimport cm_runtime as cm\nstream = cm.stream({str(path)!r}, 3)\nassert len(list(stream)) == 1\n"
        "try:\n    stream.dataset()\nexcept cm.errors.MissingExtraError as error:\n    print(error)"
    )
    done = exports.command(cwd=tmp_path, start=[sys.executable, "-c", script])
    assert done.stdout == "stream(...).dataset() needs torch: pip install 'cm-runtime[train]'\n", done.stderr
    assert issubclass(MissingExtraError, CmRuntimeError)
    assert os.listdir(tmp_path) == []
