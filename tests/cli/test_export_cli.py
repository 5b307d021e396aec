"""``cm-runtime export``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import onnx
import pytest

from cm_runtime.artifact import read_manifest

Cli = Callable[..., Any]


def test_the_file_takes_the_checkpoints_name_and_the_message_says_how_good_it_is(
    cli: Cli, boundary: exported.Files, tmp_path: Path
) -> None:
    mine = exported.copied(boundary.checkpoint, tmp_path)
    outcome = cli("export", mine.name)
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.onnx", "ckpt.pt"]
    parity = read_manifest(tmp_path / "ckpt.onnx").parity
    assert parity is not None
    megabytes = (tmp_path / "ckpt.onnx").stat().st_size / 1e6
    assert outcome.out == (
        f"ckpt.onnx: {megabytes:.1f} MB, within {parity.max_abs:.1e} of torch at 7 noise levels ({parity.engine});"
        " now cm-runtime sample ckpt.onnx\n"
    )
    assert len(onnx.load(tmp_path / "ckpt.onnx").functions) == 1


def test_what_was_exported_is_sampled(cli: Cli, boundary: exported.Files) -> None:
    assert cli("export", boundary.checkpoint, "-o", "m.onnx").code == 0
    assert cli("sample", "m.onnx", "--count", 2, "-o", "x.png").code == 0


def test_inline_leaves_no_function(cli: Cli, boundary: exported.Files, tmp_path: Path) -> None:
    assert cli("export", boundary.checkpoint, "--inline", "-o", "m.onnx").code == 0
    graph = onnx.load(tmp_path / "m.onnx")
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}


def test_an_existing_file_is_replaced_only_with_force(cli: Cli, boundary: exported.Files, tmp_path: Path) -> None:
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


def test_an_exported_file_is_no_checkpoint(cli: Cli, boundary: exported.Files, tmp_path: Path) -> None:
    exported.copied(boundary.onnx, tmp_path)
    for options in ((), ("-o", "again.onnx"), ("--force",)):
        outcome = cli("export", "model.onnx", *options)
        assert outcome.code == 1
        assert outcome.err.startswith("error: model.onnx")
        assert len(outcome.err.splitlines()) == 1
    assert (tmp_path / "model.onnx").read_bytes() == boundary.onnx.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["m.pt", "m", "m.engine"])
def test_another_ending_is_one_line(cli: Cli, boundary: exported.Files, tmp_path: Path, name: str) -> None:
    outcome = cli("export", boundary.checkpoint, "-o", name)
    assert (outcome.code, outcome.err) == (1, f"error: {name}: an ONNX file's name ends in .onnx\n")
    assert list(tmp_path.iterdir()) == []
