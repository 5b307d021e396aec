"""``cm-runtime info``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import onnx
import pytest

Cli = Callable[..., Any]


def test_json_is_the_manifest_in_the_file(cli: Cli, boundary: exported.Files) -> None:
    outcome = cli("info", boundary.onnx, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == json.loads(onnx.load(boundary.onnx).metadata_props[0].value)


@pytest.mark.parametrize("form", ["onnx", "checkpoint"])
def test_it_names_the_file_its_images_its_classes_and_its_training(
    cli: Cli, boundary: exported.Files, form: str
) -> None:
    path: Path = getattr(boundary, form)
    outcome = cli("info", path)
    assert (outcome.code, outcome.err) == (0, "")
    first, *lines = outcome.out.splitlines()
    assert first == str(path)
    said = dict(line.split(maxsplit=1) for line in lines)
    assert said["image_shape"] == "[3, 8, 8]"
    assert said["num_classes"] == str(exported.CLASSES)
    assert said["precond"] == "boundary"
    assert said["training"] == "method ect, data none, steps 3, images 24, seconds 1.5"
    assert ("parity" in said) is (form == "onnx")


def test_a_checkpoints_json_has_its_weights_and_all_but_the_parity(cli: Cli, boundary: exported.Files) -> None:
    checkpoint, file = (json.loads(cli("info", p, "--json").out) for p in (boundary.checkpoint, boundary.onnx))
    del file["parity"]
    weights = sum(parameter.numel() for parameter in boundary.model().parameters())
    assert checkpoint == {**file, "weights": weights, "ema": ["0.999"]}


def test_without_a_file_it_is_about_the_bundled_model(cli: Cli) -> None:
    outcome = cli("info")
    assert (outcome.code, outcome.err) == (0, "")
    assert "num_classes      10" in outcome.out


def test_a_large_file_is_not_read_to_say_what_it_is(cli: Cli, boundary: exported.Files, tmp_path: Path) -> None:
    """Three gigabytes of nothing, most of which no disk holds, as an initializer's bytes would lie in a graph."""

    def varint(number: int) -> bytes:
        low = bytearray()
        while number >= 0x80:
            low.append(number & 0x7F | 0x80)
            number >>= 7
        return bytes([*low, number])

    size = 3 << 30
    manifest = onnx.load(boundary.onnx)
    manifest.ClearField("graph")
    with (tmp_path / "large.onnx").open("wb") as file:
        file.write(b"\x3a" + varint(size))  # field 7, the graph
        file.seek(size, 1)
        file.write(manifest.SerializeToString())
    outcome = cli("info", "large.onnx", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["num_classes"] == exported.CLASSES
