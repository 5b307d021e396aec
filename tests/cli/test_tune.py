"""``cm-runtime tune``: levels found, stored in the file and used from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import extractors
import numpy as np
import onnx
import pytest

from cm_runtime.checkpoints.native import save_checkpoint
from cm_runtime.export import onnx as export_onnx
from cm_runtime.manifest import read_manifest
from cm_runtime.onnx_graph.export_writer import write_manifest
from cm_runtime.schedule import NoiseRange

Cli = Callable[..., Any]
PIXELS = 8 * 8 * 3
PLAIN = ("--extractor", "x.onnx", "--reference", "s.npz", "--samples", 24, "--threads", 1)


@pytest.fixture
def place(boundary: exports.Files, tmp_path: Path, rng: np.random.Generator) -> Path:
    """A model of 8x8 images, an extractor for them and statistics."""
    exports.copied(boundary.onnx, tmp_path)
    exports.copied(boundary.checkpoint, tmp_path)
    mixture = rng.standard_normal((PIXELS, 4)).astype(np.float32) / PIXELS
    extractors.linear(tmp_path / "x.onnx", ("N", 8, 8, 3), {"features": mixture, "other": mixture[:, :3]})
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=25 * np.eye(4))
    np.savez(tmp_path / "s3.npz", mu=np.zeros(3), sigma=25 * np.eye(3))
    return tmp_path


def distance(cli: Cli, model: str, *words: object) -> float:
    """By `eval`, of the same images."""
    given = ("--extractor", "x.onnx", "--reference", "s.npz", "--count", 24, "--threads", 1, "-o", "r.json", "--force")
    assert cli("eval", model, *given, *words).code == 0
    found: float = json.loads(Path("r.json").read_text())["figures"]["frechet_distance"]
    return found


@pytest.mark.process
def test_levels_are_stored_used_and_no_worse_than_the_default(cli: Cli, place: Path) -> None:
    before = (place / "model.onnx").read_bytes()
    outcome = cli("tune", "model.onnx", "--steps", 2, *PLAIN, "-o", "tuned.onnx")
    assert (outcome.code, outcome.err) == (0, "")
    assert (place / "model.onnx").read_bytes() == before
    levels = read_manifest("tuned.onnx").sigmas[2]
    assert levels[0] == 80 and 0.002 < levels[1] < 80
    tuned, default = distance(cli, "tuned.onnx", "--steps", 2), distance(cli, "model.onnx", "--steps", 2)
    assert tuned <= default
    assert f"2 steps, default 80, {NoiseRange().karras(3)[1]:g}: Frechet distance {default:.4g}" in outcome.out
    assert f"Frechet distance {tuned:.4g} after" in outcome.out
    line = f"{levels[0]:g}, {levels[1]:g}"
    assert f"2 steps, tuned   {line}" in outcome.out
    # nothing else than the levels has changed, and sample and info find them
    assert read_manifest("tuned.onnx").model_copy(update={"sigmas": {}}) == read_manifest("model.onnx")
    ours, theirs = onnx.load("tuned.onnx"), onnx.load("model.onnx")
    assert ours.graph == theirs.graph and list(ours.functions) == list(theirs.functions)
    assert cli("sample", "tuned.onnx", "--steps", 2, "--batch", 3, "-o", "a.npz").code == 0
    assert cli("sample", "model.onnx", "--sigmas", ",".join(map(str, levels)), "--batch", 3, "-o", "b.npz").code == 0
    with np.load("a.npz") as a, np.load("b.npz") as b:
        assert np.array_equal(a["arr_0"], b["arr_0"])
    assert str(levels[1]) in cli("info", "tuned.onnx").out


@pytest.mark.process
def test_several_samplers_are_tuned_at_once(cli: Cli, place: Path) -> None:
    outcome = cli("tune", "model.onnx", "--steps", "3,2", *PLAIN, "--force")
    assert outcome.code == 0
    sigmas = read_manifest("model.onnx").sigmas
    assert sorted(sigmas) == [2, 3] and len(sigmas[3]) == 3
    # in place, and the next levels join those that are there
    assert cli("tune", "model.onnx", "--steps", "4", *PLAIN, "--samples", 12, "--force").code == 0
    after = read_manifest("model.onnx").sigmas
    assert sorted(after) == [2, 3, 4] and (after[2], after[3]) == (sigmas[2], sigmas[3])


def test_what_was_found_is_kept_when_the_next_search_is_interrupted(
    cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cm_runtime.evaluate import tuning

    search = tuning.search

    def interrupted(objective: Any, steps: int, *rest: Any) -> Any:
        if steps == 3:
            raise KeyboardInterrupt
        return search(objective, steps, *rest)

    monkeypatch.setattr(tuning, "search", interrupted)
    assert cli("tune", "model.onnx", "--steps", "2,3", *PLAIN, "-o", "t.onnx").code == 130
    assert list(read_manifest("t.onnx").sigmas) == [2]


@pytest.mark.parametrize(
    "words",
    [
        ("--samples", 12),
        ("--seed", 1),
        ("--labels", "3"),
        ("--output-name", "other", "--reference", "s3.npz"),
    ],
)
def test_an_option_changes_what_is_found(cli: Cli, place: Path, words: tuple[object, ...]) -> None:
    plain, changed = (cli("tune", "model.onnx", *PLAIN, *w, "-o", "t.onnx", "--force") for w in ((), words))
    assert plain.code == changed.code == 0
    assert plain.out != changed.out


def test_the_micro_batch_is_that_of_the_engine(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cm_runtime.backends.ort import OrtBackend

    sizes = set()
    denoise = OrtBackend.denoise

    def counted(self: Any, x: Any, *rest: Any) -> Any:
        sizes.add(len(x))
        return denoise(self, x, *rest)

    monkeypatch.setattr(OrtBackend, "denoise", counted)
    assert cli("tune", "model.onnx", *PLAIN, "--micro-batch", 7, "-o", "t.onnx").code == 0
    assert sizes == {7, 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sampler.onnx",), "sampler.onnx is a sampler file, whose levels are fixed: tune the denoiser"),
        (("model.onnx", "--backend", "torch", "-o", "t.onnx"), "the torch backend runs checkpoints"),
        (("ckpt.pt", "-o", "t.onnx"), "tune what cm-runtime export makes of it"),
        (("model.onnx",), "--force to store the levels in model.onnx itself"),
        (("--force",), "the bundled model is not replaced"),
        (("model.onnx", "-o", "t.txt"), "ends in .onnx"),
        (("model.onnx", "-o", "x.onnx"), "x.onnx exists; replace it with --force"),
        (("model.onnx", "-o", "nowhere/t.onnx"), "no folder nowhere"),
        (("none.onnx", "-o", "t.onnx"), "none.onnx: no such file"),
        (("x.onnx", "-o", "t.onnx"), "was not exported by cm-runtime"),
        (("model.onnx", "--steps", 5, "-o", "t.onnx"), "--steps takes 2, 3, 4"),
        (("model.onnx", "--steps", "2,2", "-o", "t.onnx"), "--steps takes 2, 3, 4"),
        (("model.onnx", "--samples", 1, "-o", "t.onnx"), "--samples must be at least 2"),
        (("model.onnx", "--labels", "9", "-o", "t.onnx"), "labels must be from 0 to 4"),
        (("model.onnx", "--seed", -1, "-o", "t.onnx"), "seed must be"),
        (("model.onnx", "--threads", 0, "-o", "t.onnx"), "--threads must be at least 1"),
        (("model.onnx", "--device", "cuda:0", "-o", "t.onnx"), "cuda:0"),
        (("model.onnx", "--range", "0:1", "-o", "t.onnx"), "takes uint8"),
        (("model.onnx", "--reference", "s3.npz", "-o", "t.onnx"), "statistics of 3 features"),
        (("teacher.onnx", "-o", "t.onnx"), "EDM teacher"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    cli: Cli, place: Path, words: tuple[object, ...], message: str
) -> None:
    if words[0] == "sampler.onnx":
        fixed = read_manifest("model.onnx").model_copy(update={"graph": "sampler", "sigmas": {2: (80.0, 1.5)}})
        write_manifest("model.onnx", "sampler.onnx", fixed)
    if words[0] == "teacher.onnx":
        save_checkpoint(exports.checkpoint("boundary", method="edm"), place / "teacher.pt")
        from cm_runtime.checkpoints.native import read_checkpoint

        export_onnx(read_checkpoint(place / "teacher.pt"), place / "teacher.onnx")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    outcome = cli("tune", *PLAIN, *words)
    assert outcome.code == 1 and message in outcome.err, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


@pytest.mark.process
def test_without_torch_a_model_is_tuned(place: Path) -> None:
    words = ("tune", "model.onnx", *PLAIN, "--samples", 6, "-o", "t.onnx")
    done = exports.command(*words, cwd=place, start=exports.hiding("torch", "onnx", "pooch"))
    assert done.returncode == 0, done.stderr
    assert list(read_manifest(place / "t.onnx").sigmas) == [2]
