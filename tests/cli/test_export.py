"""``cm-runtime export``."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import onnx
import pytest

from cm_runtime.manifest import read_manifest

Cli = Callable[..., Any]


@pytest.mark.process
def test_the_file_takes_the_checkpoints_name_and_the_message_says_how_good_it_is(
    cli: Cli, boundary: exports.Files, tmp_path: Path
) -> None:
    mine = exports.copied(boundary.checkpoint, tmp_path)
    outcome = cli("export", mine.name, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.onnx", "ckpt.pt"]
    parity = read_manifest(tmp_path / "ckpt.onnx").parity
    assert parity is not None
    graph = onnx.load(tmp_path / "ckpt.onnx")
    first, *rest = outcome.out.splitlines()
    said = dict(line.split(maxsplit=1) for line in rest if not line.startswith("     "))
    assert first == "ckpt.onnx: denoiser, fp32"
    assert said["nodes"] == f"{len(graph.graph.node)}; 0 constants folded"
    assert said["size"] == f"{(tmp_path / 'ckpt.onnx').stat().st_size / 1e6:.1f} MB"
    assert said["parity"].startswith(f"within {parity.max_abs:.1e} of torch in float32 ({parity.engine})")
    assert "0.002: " in outcome.out and "80: " in outcome.out
    assert said["now"] == "cm-runtime sample ckpt.onnx"
    assert len(graph.functions) == 1


@pytest.mark.slow
def test_compared_it_says_how_a_plain_export_fares(cli: Cli, boundary: exports.Files) -> None:
    outcome = cli("export", boundary.checkpoint, "-o", "m.onnx", "--compare", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    said = dict(line.split(maxsplit=1) for line in outcome.out.splitlines()[1:] if not line.startswith("     "))
    assert re.fullmatch(r"\d+ \(\d+ in a plain export\); 0 constants folded", said["nodes"])
    assert re.fullmatch(r"\d+\.\d MB \(.*\)", said["size"])
    assert re.fullmatch(r"a plain export takes .*\d\.\d\dx.* as long.*, batch 1 \(onnxruntime [\d.]+\)", said["speed"])


@pytest.mark.process
def test_a_sampler_says_its_steps_and_what_was_folded(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    outcome = cli("export", boundary.checkpoint, "--graph", "sampler", "--sigmas", "80,1.5", "-o", "s.onnx")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("s.onnx: sampler, 2 steps at 80, 1.5, fp32\n")
    assert re.search(r"nodes    \d+; [1-9]\d constants folded", outcome.out)
    assert "speed" not in outcome.out and "plain" not in outcome.out  # compared when asked only
    assert "images: " in outcome.out
    assert read_manifest(tmp_path / "s.onnx").sigmas == {2: (80.0, 1.5)}
    assert cli("sample", "s.onnx", "--count", 3, "-o", "x.npz").code == 0
    refused = cli("sample", "s.onnx", "--steps", 3, "-o", "y.npz")
    assert refused.code == 1 and "draws in 2 steps" in refused.err


@pytest.mark.process
@pytest.mark.parametrize("precision", exports.HALVES)
def test_half_precision_is_in_the_file(cli: Cli, boundary: exports.Files, tmp_path: Path, precision: str) -> None:
    assert cli("export", boundary.checkpoint, "--precision", precision, "-o", "m.onnx").code == 0
    assert read_manifest(tmp_path / "m.onnx").precision == precision
    assert cli("sample", "m.onnx", "--count", 2, "-o", "x.npz").code == 0


@pytest.mark.process
def test_an_engine_is_built_without_a_gpu_and_its_log_kept(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    words = ("--format", "tensorrt-rtx", "--gpu", "8.9,12.0", "--batch", "1,8:8:64", "--graph", "sampler")
    outcome = cli("export", boundary.checkpoint, *words, "-o", "m.engine")
    assert (outcome.code, outcome.err) == (0, "")
    assert "for compute capability 8.9, 12.0, batches 1,8:8:64" in outcome.out
    assert {path.name for path in tmp_path.iterdir()} == {"m.engine", "m.engine.json", "m.engine.log"}
    assert "\n    target           tensorrt\n" in cli("info", "m.engine").out
    refused = cli("sample", "m.engine")
    assert refused.code == 1 and len(refused.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", 2], "--steps and --sigmas are of --graph sampler"),
        (["--sigmas", "80,1"], "--steps and --sigmas are of --graph sampler"),
        (["--batch", "1:2:3"], "an .onnx takes any batch"),
        (["--optimization-level", 3], "--optimization-level is of --format tensorrt"),
        (["--format", "tensorrt-rtx", "--gpu", "9.0"], "H100, H200"),
        (["--gpu", "8.9"], "--gpu is of --format tensorrt-rtx"),
        (["--format", "tensorrt", "--gpu", "8.9"], "--gpu is of --format tensorrt-rtx"),
        (["--format", "tensorrt-rtx", "--batch", "3:2:1"], "3:2:1"),
        (["--format", "tensorrt-rtx", "--gpu", "9.9"], "9.9"),
        (["--format", "tensorrt-rtx"], "--gpu"),
        (["--format", "tensorrt"], "pip install 'cm-runtime[tensorrt]'"),
        (["--format", "diffusers", "--graph", "sampler"], "are of graphs for engines"),
        (["--format", "diffusers", "--precision", "fp16"], "are of graphs for engines"),
        (["--graph", "sampler", "--sigmas", "80,x"], "numbers separated by commas"),
        (["--graph", "sampler", "--sigmas", "80,90"], "descend"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    cli: Cli, boundary: exports.Files, tmp_path: Path, words: list[Any], message: str
) -> None:
    outcome = cli(
        "export",
        boundary.checkpoint,
        *words,
        "-o",
        "m.engine" if "tensorrt" in str(words) else "m.onnx",
    )
    assert (outcome.code, outcome.out) == (1, "")
    assert message in outcome.err and len(outcome.err.splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".log"]


@pytest.mark.process
def test_what_was_exported_is_sampled(cli: Cli, boundary: exports.Files) -> None:
    assert cli("export", boundary.checkpoint, "-o", "m.onnx").code == 0
    assert cli("sample", "m.onnx", "--count", 2, "-o", "x.png").code == 0


@pytest.mark.process
def test_inline_leaves_no_function(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    assert cli("export", boundary.checkpoint, "--inline", "-o", "m.onnx").code == 0
    graph = onnx.load(tmp_path / "m.onnx")
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}


@pytest.mark.process
def test_an_existing_file_is_replaced_only_with_force(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"somebody's work")
    outcome = cli("export", boundary.checkpoint, "-o", "m.onnx")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: m.onnx exists; replace it with --force\n"
    assert target.read_bytes() == b"somebody's work"
    assert cli("export", boundary.checkpoint, "-o", "m.onnx", "--force").code == 0
    assert read_manifest(target).precond == "boundary"


def test_a_missing_checkpoint_in_a_missing_folder_is_what_the_message_is_about(cli: Cli) -> None:
    outcome = cli("export", "runs/nowhere/ckpt.pt")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: runs/nowhere/ckpt.pt: no such file\n"


def test_an_exported_file_is_no_checkpoint(cli: Cli, boundary: exports.Files, tmp_path: Path) -> None:
    exports.copied(boundary.onnx, tmp_path)
    for options in ((), ("-o", "again.onnx"), ("--force",)):
        outcome = cli("export", "model.onnx", *options)
        assert outcome.code == 1
        assert outcome.err.startswith("error: model.onnx")
        assert len(outcome.err.splitlines()) == 1
    assert (tmp_path / "model.onnx").read_bytes() == boundary.onnx.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["m.pt", "m", "m.engine"])
def test_another_ending_is_one_line(cli: Cli, boundary: exports.Files, tmp_path: Path, name: str) -> None:
    outcome = cli("export", boundary.checkpoint, "-o", name)
    assert (outcome.code, outcome.err) == (1, f"error: {name}: an ONNX file's name ends in .onnx\n")
    assert list(tmp_path.iterdir()) == []
