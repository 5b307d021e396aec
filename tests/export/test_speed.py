"""The comparison with a plain export: what it is, and what has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exports
import pytest

from cm_runtime import export
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.export import speed


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("graph", ["denoiser", "sampler"])
def test_both_draw_and_take_turns(boundary: exports.Files, tmp_path: Path, graph: Any) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    made = export.onnx(ours, tmp_path / "m.onnx", graph=graph)
    found = speed.with_plain(ours, tmp_path / "m.onnx", made.manifest, batch=3)
    assert found is not None
    assert found.nodes > 200 and found.bytes > 1e6 and found.batch == 3
    assert 0.1 < found.low <= found.times <= found.high < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.process
@pytest.mark.parametrize("how", [{"graph": "network"}, {"precision": "fp16"}])
def test_what_a_plain_export_has_no_match_for_is_not_compared(
    boundary: exports.Files, tmp_path: Path, how: dict[str, Any]
) -> None:
    ours = read_checkpoint(boundary.checkpoint)
    made = export.onnx(ours, tmp_path / "m.onnx", **how)
    assert speed.with_plain(ours, tmp_path / "m.onnx", made.manifest) is None


def test_nor_are_weights_of_which_three_copies_would_be_too_many(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "LARGEST", 1000)
    ours = read_checkpoint(boundary.checkpoint)
    assert speed.with_plain(ours, boundary.onnx, ours.manifest()) is None


def test_quartiles_too_far_apart_are_no_answer() -> None:
    quiet = speed.Comparison(9, 99, 1, 1.2, 1.1, 1.3, "onnxruntime 1.32.0")
    assert quiet.text == "1.20x [1.10, 1.30] as long"
    wild = speed.Comparison(9, 99, 1, 1.01, 0.91, 16.39, "onnxruntime 1.32.0")
    assert wild.text == "from 0.91x to 16.39x as long: the machine is too noisy to tell"
