"""``cm-runtime info``."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
from PIL import Image

from cm_runtime.backends import engine_file
from cm_runtime.manifest import read_manifest

Cli = Callable[..., Any]


def test_json_is_the_manifest_in_the_file(cli: Cli, boundary: exports.Files) -> None:
    outcome = cli("info", boundary.onnx, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == json.loads(onnx.load(boundary.onnx).metadata_props[0].value)


@pytest.mark.parametrize("form", ["onnx", "checkpoint"])
def test_it_names_the_file_its_images_its_classes_and_its_training(
    cli: Cli, boundary: exports.Files, form: str
) -> None:
    path: Path = getattr(boundary, form)
    outcome = cli("info", path)
    assert (outcome.code, outcome.err) == (0, "")
    first, *lines = outcome.out.splitlines()
    assert first == str(path)
    said = dict(line.split(maxsplit=1) for line in lines)
    assert said["image_shape"] == "3, 8, 8"
    assert said["num_classes"] == str(exports.CLASSES)
    assert said["precond"] == "boundary"
    assert said["training"] == "method ect, data none, steps 3, images 24, seconds 1.5"
    assert ("parity" in said) is (form == "onnx")


def test_a_checkpoints_json_has_its_weights_and_all_but_the_parity(cli: Cli, boundary: exports.Files) -> None:
    checkpoint, file = (json.loads(cli("info", p, "--json").out) for p in (boundary.checkpoint, boundary.onnx))
    del file["parity"]
    weights = sum(parameter.numel() for parameter in boundary.model().parameters())
    assert checkpoint == {**file, "weights": weights, "ema": ["0.999"]}


def test_without_a_file_it_is_about_the_bundled_model(cli: Cli) -> None:
    outcome = cli("info")
    assert (outcome.code, outcome.err) == (0, "")
    assert "num_classes      10" in outcome.out


@pytest.mark.process
@pytest.mark.parametrize("size", [1 << 26, pytest.param(3 << 30, marks=pytest.mark.slow)])
def test_a_large_file_is_not_read_to_say_what_it_is(
    cli: Cli, boundary: exports.Files, tmp_path: Path, size: int
) -> None:
    """Three gigabytes of nothing, most of which no disk holds, as an initializer's bytes would lie in a graph."""

    def varint(number: int) -> bytes:
        low = bytearray()
        while number >= 0x80:
            low.append(number & 0x7F | 0x80)
            number >>= 7
        return bytes([*low, number])

    manifest = onnx.load(boundary.onnx)
    manifest.ClearField("graph")
    with (tmp_path / "large.onnx").open("wb") as file:
        file.write(b"\x3a" + varint(size))  # field 7, the graph
        file.seek(size, 1)
        file.write(manifest.SerializeToString())
    outcome = cli("info", "large.onnx", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["num_classes"] == exports.CLASSES


def test_numbers_are_short_and_a_list_of_one_is_no_list(cli: Cli, boundary: exports.Files) -> None:
    said = dict(line.split(maxsplit=1) for line in cli("info", boundary.checkpoint).out.splitlines()[1:])
    assert said["ema"] == "0.999" and said["sigma_max"] == "80"
    shown = cli("info", boundary.onnx).out
    assert re.search(r"max_abs \d(\.\d+)?e-\d\d,", shown) and not re.search(r"\d\.\d{8}", shown)


def test_an_engine_has_a_line_for_each_fact(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    facts = {"sha256": "ab" * 32, "bytes": 4, "package": "tensorrt_rtx", "version": "1.2", "gpus": ("8.9", "12.0")}
    facts |= {"profiles": [{"min": 1, "opt": 8, "max": 64}], "model": read_manifest(boundary.onnx), "plugin": True}
    (tmp_path / "x.engine").write_bytes(b"none")
    manifest = engine_file.EngineManifest(**facts, onnx_sha256="cd" * 32)
    (tmp_path / "x.engine.json").write_text(manifest.model_dump_json())
    outcome = cli("info", "x.engine")
    assert outcome.code == 0 and "{" not in outcome.out and "config" not in outcome.out
    assert "\n  gpus             8.9, 12.0\n" in outcome.out and "\n    image_shape      3, 8, 8\n" in outcome.out


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_images_say_what_they_were_drawn_with(cli: Cli, name: str) -> None:
    assert cli("sample", "--count", 2, "--steps", 1, "--seed", 7, "--backend", "ort", "-o", name).code == 0
    outcome = cli("info", name)
    assert (outcome.code, outcome.err) == (0, "")
    assert "\n  seed             7\n" in outcome.out and "\n  sigmas           80\n" in outcome.out
    assert json.loads(cli("info", name, "--json").out)["labels"] == "all"


@pytest.mark.parametrize("kind", ["picture", "arrays", "numbers", "text", "damaged", "folder"])
def test_what_says_nothing_of_its_making_is_one_true_line(cli: Cli, tmp_path: Path, kind: str) -> None:
    if kind == "picture":
        Image.new("L", (4, 4)).save(tmp_path / "x.png")
    elif kind in ("text", "damaged"):
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing" if kind == "damaged" else b"text")
    elif kind == "folder":
        (tmp_path / "x.png").mkdir()
    else:
        np.savez(tmp_path / "x.npz", **{"arr_0" if kind == "arrays" else "cm_runtime": np.zeros(9)})
    outcome = cli("info", "x.npz" if kind in ("arrays", "numbers") else "x.png")
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and outcome.err.startswith("error: x.")


@pytest.mark.parametrize("command", ["info", "export"])
def test_the_folder_of_a_run_is_told_from_a_model(
    cli: Cli, boundary: exports.Files, tmp_path: Path, command: str
) -> None:
    (tmp_path / "runs").mkdir()
    exports.copied(boundary.checkpoint, tmp_path / "runs")
    outcome = cli(command, "runs")
    assert outcome.err == "error: runs is the folder of a training run: take its checkpoint, runs/ckpt.pt\n"
