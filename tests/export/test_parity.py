"""Parity: what an export says of its own accuracy, checked with graphs that are wrong by a known amount."""

from collections.abc import Callable
from pathlib import Path

import exports
import numpy as np
import pytest
from onnx import helper

from cm_runtime import export
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.choices import Precision, Target
from cm_runtime.errors import ParityError
from cm_runtime.export import graphs, parity, to_onnx
from cm_runtime.export.builder import Graph
from cm_runtime.export.graphs import denoiser
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.networks.consistency import ConsistencyModel

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
Build = Callable[[ConsistencyModel, Precision, Target], Graph]


def shifted(name: str, by: float, row: int | None = None) -> Build:
    """A graph builder that adds ``by`` to one weight (to one row of it)."""

    def build(model: ConsistencyModel, precision: Precision, target: Target) -> Graph:
        g = denoiser(model, precision, target)
        (weight,) = [weight for weight in g.weights if weight.endswith(name)]
        values = g.weights[weight].astype(np.float32)
        values[slice(None) if row is None else row] += np.float32(by)
        g.weights[weight] = values
        return g

    return build


def exporting(
    files: exports.Files,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Build,
    force: bool = False,
) -> Manifest:
    monkeypatch.setattr(graphs, "denoiser", build)
    return export.onnx(read_checkpoint(files.checkpoint), target, force=force).manifest


def test_the_recorded_parity_covers_the_whole_range_of_noise_and_two_batch_sizes(each: exports.Files) -> None:
    parity = read_manifest(each.onnx).parity
    assert parity is not None
    assert parity.sigmas[0] == pytest.approx(SIGMA_MIN)
    assert parity.sigmas[-1] == pytest.approx(SIGMA_MAX)
    assert len(parity.sigmas) == 7
    assert parity.batches == (1, 7)
    assert parity.engine.startswith("onnxruntime ")
    assert 0 < parity.max_abs < 1e-5  # float32 against float32, outputs of order 1


@pytest.mark.process
def test_an_error_of_known_size_is_recorded_as_that_size(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bias moves F by b, and so f by c_out b: at sigma 80 by 0.49998 b."""
    build = shifted("F.out.2.bias", 1e-4)
    parity = exporting(boundary, tmp_path / "m.onnx", monkeypatch, build).parity
    assert parity is not None
    assert parity.max_abs == pytest.approx(0.49998e-4, rel=0.1)


@pytest.mark.process
@pytest.mark.parametrize("i", [0, 3, 7])
def test_the_largest_error_of_all_batches_is_recorded(boundary: exports.Files, i: int) -> None:
    manifest = read_manifest(boundary.onnx)
    answers = parity.answers(boundary.model(), manifest)
    answers[i] = answers[i] + np.float32(5e-5)
    assert parity.measure(boundary.onnx, manifest, answers).max_abs == pytest.approx(5e-5, rel=0.1)


@pytest.mark.process
def test_an_error_above_the_tolerance_is_refused_by_its_size_and_nothing_is_written(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParityError, match=r"differs from its checkpoint by 0\.000\d+ .*nothing was written"):
        exporting(boundary, tmp_path / "m.onnx", monkeypatch, shifted("F.out.2.bias", 3e-4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_an_export_that_misses_leaves_the_file_it_was_to_replace(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"what was there")
    with pytest.raises(ParityError):
        exporting(boundary, target, monkeypatch, shifted("F.out.2.bias", 1.0), force=True)
    assert target.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.process
@pytest.mark.parametrize("by", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    with pytest.raises(ParityError):
        exporting(boundary, tmp_path / "m.onnx", monkeypatch, shifted("F.out.2.bias", by))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick("0", "4")
@pytest.mark.process
@pytest.mark.parametrize("label", range(exports.CLASSES))
def test_a_wrong_embedding_of_any_one_class_is_noticed(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: int
) -> None:
    with pytest.raises(ParityError):
        exporting(boundary, tmp_path / "m.onnx", monkeypatch, shifted("label_emb.weight", 1.0, row=label))


@pytest.mark.process
def test_a_graph_that_mixes_the_noise_levels_of_a_batch_is_noticed(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right for every batch of one: the skip-scale takes the batch's largest sigma for all."""

    def mixing(model: ConsistencyModel, precision: Precision, target: Target) -> Graph:
        g = denoiser(model, precision, target)
        (node,) = [node for node in g._nodes if node.op_type == "SkipScale"]
        node.input[2] = "largest"
        g._nodes.insert(0, helper.make_node("ReduceMax", ["sigma"], ["largest"], keepdims=1))
        return g

    with pytest.raises(ParityError):
        exporting(boundary, tmp_path / "m.onnx", monkeypatch, mixing)


@pytest.mark.process
def test_a_graph_of_another_boundary_is_noticed(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDM's form in place of the consistency model's: the two differ by 0.4% of F at sigma 0.002."""

    def edm(model: ConsistencyModel, precision: Precision, target: Target) -> Graph:
        g = denoiser(model, precision, target)
        (node,) = [node for node in g._nodes if node.op_type == "SkipScale"]
        (attribute,) = [a for a in node.attribute if a.name == "sigma_boundary"]
        attribute.f = 0.0
        return g

    with pytest.raises(ParityError):
        exporting(boundary, tmp_path / "m.onnx", monkeypatch, edm)


@pytest.mark.process
def test_an_error_in_weights_beside_the_file_is_noticed_and_neither_is_written(
    boundary: exports.Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "LARGEST_INSIDE", 0)
    with pytest.raises(ParityError, match="nothing was written"):
        exporting(boundary, tmp_path / "m.onnx", monkeypatch, shifted("F.out.2.weight", 1e-3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_the_model_answers_all_that_the_export_is_asked(boundary: exports.Files) -> None:
    """Its answers are kept, so that it need not be: seven batches of 1 and one of 7."""
    manifest = read_manifest(boundary.onnx)
    answers = parity.answers(boundary.model(), manifest)
    assert [answer.shape for answer in answers] == [(1, 3, 8, 8)] * 7 + [(7, 3, 8, 8)]
    assert np.abs(np.concatenate(answers[:7]) - answers[7]).max() < 1e-5
    assert parity.measure(boundary.onnx, manifest, answers).max_abs < 1e-5
    assert parity.measure(boundary.apart, manifest, answers).max_abs < 1e-5
    with pytest.raises(ParityError, match=r"differs from its checkpoint by 1 \(6\.0 dB\) at sigma 80 "):
        parity.measure(boundary.onnx, manifest, [*answers[:6], answers[6] + 1, answers[7]])
