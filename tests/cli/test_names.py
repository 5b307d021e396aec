"""Names that no file can have, or that no file has: one line each, wherever they stand on the command line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from PIL import Image

NAMES = {
    "300 bytes": "a" * 300,
    "a long folder": "b" * 300 + "/x",
    "no such user": "~nobody-of-that-name/x",
    "a loop": "loop",
    "under a loop": "loop/x",
    "no UTF-8": "no\udcff/x",
    "under a file": "plain.txt/x",
}
# The name's place is None. Its ending, where a command looks at that.
COMMANDS: dict[str, tuple[list[str | None], str]] = {
    "sample": (["sample", None, "--count", "1"], ".onnx"),
    "sample a checkpoint": (["sample", None, "--count", "1"], ".pt"),
    "sample, no ending": (["sample", None, "--count", "1"], ""),
    "sample -o": (["sample", "model.onnx", "--count", "1", "-o", None], ".png"),
    "sample -o npz": (["sample", "model.onnx", "--count", "1", "-o", None], ".npz"),
    "sample into shards": (["sample", "model.onnx", "--count", "1", "-o", None], "/"),
    "shards of": (["sample", None, "--count", "1", "-o", "shards/"], ".onnx"),
    "info": (["info", None], ".onnx"),
    "info of an engine": (["info", None], ".engine"),
    "info of a checkpoint": (["info", None], ".safetensors"),
    "export": (["export", None], ".pt"),
    "export -o": (["export", "ckpt.pt", "-o", None], ".onnx"),
    "export to diffusers": (["export", "ckpt.pt", "--format", "diffusers", "-o", None], ""),
    "export of diffusers": (["export", None], ""),
    "train": (["train", None], ".toml"),
    "train --data": (["train", "fashion-mnist", "--out", "run", "--data", None], ""),
    "tune": (["tune", None, "-o", "tuned.onnx"], ".onnx"),
    "tune -o": (["tune", "model.onnx", "-o", None], ".onnx"),
    "tune --reference": (["tune", "model.onnx", "-o", "t.onnx", "--reference", None], ".npz"),
    "eval of samples": (["eval", None], ".npz"),
    "eval of data": (["eval", None], ""),
    "eval --reference": (["eval", "images.npz", "--reference", None], ".npz"),
    "eval --extractor": (["eval", "images.npz", "--extractor", None], ".onnx"),
    "eval -o": (["eval", "images.npz", "-o", None], ".json"),
    "eval --save-statistics": (["eval", "images.npz", "--save-statistics", None], ".npz"),
    "edit a picture": (["edit", "denoise", "model.onnx", None, "--sigma", "1", "--backend", "ort"], ".png"),
    "edit arrays": (["edit", "denoise", "model.onnx", None, "--sigma", "1", "--backend", "ort"], ".npz"),
    "edit by a model": (["edit", "denoise", None, "a.png", "--sigma", "1"], ".onnx"),
    "edit --mask": (
        ["edit", "inpaint", "model.onnx", "a.png", "--backend", "ort", "--mask", None],
        ".png",
    ),
    "edit -o": (["edit", "denoise", "a.png", "--sigma", "1", "--labels", "1", "-o", None], ".npz"),
    "interpolate -o": (["edit", "interpolate", "model.onnx", "--labels", "1", "-o", None], ".gif"),
    "bench run -o": (["bench", "run", "model.onnx", "--budget", "0.01", "-o", None], ".json"),
    "bench run --suite": (["bench", "run", "--suite", None], ".toml"),
    "bench run --against": (["bench", "run", "--steps", "1", "--budget", "0.01", "--against", None], ".whl"),
    "bench compare": (["bench", "compare", None], ".json"),
    "bench report": (["bench", "report", None], ".json"),
    "bench report --quality": (["bench", "report", "bench.json", "--quality", None], ".json"),
    "bench report --plots": (["bench", "report", "bench.json", "--plots", None], ""),
}


@pytest.fixture(scope="module")
def folder(boundary: exports.Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a checkpoint, images and a link to itself, for all tests: nothing is to be written."""
    place = tmp_path_factory.mktemp("names")
    exports.copied(boundary.onnx, place)
    exports.copied(boundary.checkpoint, place)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 28, 28, 1), np.uint8)
    np.savez(place / "images.npz", arr_0=pixels)
    np.savez(place / "data.npz", images=pixels, labels=np.arange(4))
    Image.fromarray(pixels[0, :, :, 0]).save(place / "a.png")
    (place / "plain.txt").write_text("text")
    for ending in {ending for _, ending in COMMANDS.values() if ending != "/"}:
        (place / f"loop{ending}").symlink_to(f"loop{ending}")
    return place


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_cannot_be_is_one_line(
    cli: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(folder)
    words, ending = COMMANDS[command]
    before = set(os.listdir(folder))
    kept = {"bench.samples.jsonl"}  # which bench run opens first of all
    wrong = {}
    is_output = words[words.index(None) - 1] in ("-o", "--save-statistics")
    for name, text in NAMES.items():
        if is_output and name == "a loop":  # a finished file may replace the link
            continue
        outcome = cli(*(text + ending if word is None else word for word in words))
        one = outcome.err.startswith("error: ") and outcome.err.count("\n") == 1 and "unexpected" not in outcome.err
        if outcome.code != 1 or not one or outcome.out or set(os.listdir(folder)) - before - kept:
            wrong[name] = outcome, set(os.listdir(folder)) - before
    assert not wrong
