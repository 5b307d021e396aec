"""What is refused before TensorRT sees a byte of it: engines are native code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cm_runtime.backends import engine_file
from cm_runtime.backends.batch_profiles import Profile
from cm_runtime.backends.engine_file import EngineManifest, read_engine, read_engine_manifest
from cm_runtime.errors import ArtifactError
from cm_runtime.manifest import Manifest

CONTENT = bytes(range(256)) * 16
HERE = ("tensorrt_rtx", "1.7.1.116", "8.9")


@pytest.fixture
def engine(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> Path:
    """An engine's file with its manifest; what is inside is nothing that any TensorRT made."""
    path = tmp_path / "model.engine"
    path.write_bytes(CONTENT)
    write(path, made(make_manifest()))
    return path


def made(model: Manifest, content: bytes = CONTENT, **changes: Any) -> EngineManifest:
    plain = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "package": "tensorrt_rtx",
        "version": "1.7.1.116",
        "gpus": ("8.9", "12.0"),
        "profiles": (Profile(min=1, opt=1, max=1), Profile(min=2, opt=8, max=16)),
        "model": model,
        "onnx_sha256": "0" * 64,
        "plugin": False,
        "log": "model.engine.log",
    }
    return EngineManifest(**{**plain, **changes})


def write(path: Path, manifest: EngineManifest) -> None:
    engine_file.manifest_path(path).write_text(manifest.model_dump_json())


def opened(path: Path, package: Any = HERE[0], version: str = HERE[1], capability: str = HERE[2]) -> bytes:
    return read_engine(path, read_engine_manifest(path), package, version, capability)


def refused(path: Path, pattern: str, *machine: str) -> None:
    """One line that says why and names the command that builds it again."""
    with pytest.raises(ArtifactError, match=pattern) as caught:
        opened(path, *machine)
    line = str(caught.value)
    assert "\n" not in line
    assert "cm-runtime export CKPT --format tensorrt" in line
    assert str(path) in line


def test_an_engine_of_this_machine_is_read_whole(engine: Path) -> None:
    assert opened(engine) == CONTENT
    assert opened(engine, *HERE[:2], "12.0") == CONTENT


def test_the_manifest_reads_back_as_it_was_written(engine: Path, make_manifest: Callable[..., Manifest]) -> None:
    assert read_engine_manifest(engine) == made(make_manifest())
    beside = [engine_file.manifest_path(engine), engine_file.log_path(engine), engine_file.layers_path(engine)]
    assert [path.name for path in beside] == ["model.engine.json", "model.engine.log", "model.engine.layers.json"]


@pytest.mark.parametrize("place", [0, 1, 255, len(CONTENT) // 2, len(CONTENT) - 1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_anywhere_is_refused(engine: Path, place: int, bit: int) -> None:
    content = bytearray(CONTENT)
    content[place] ^= 1 << bit
    engine.write_bytes(content)
    refused(engine, "not the engine that its manifest was written for")


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"\0", CONTENT * 2])
def test_another_length_is_refused_before_it_is_read(engine: Path, content: bytes) -> None:
    engine.write_bytes(content)
    refused(engine, rf"has {len(content)} bytes, not the {len(CONTENT)}")


def test_a_manifest_of_another_engine_is_refused(engine: Path, make_manifest: Callable[..., Manifest]) -> None:
    write(engine, made(make_manifest(), CONTENT[::-1]))
    refused(engine, "not the engine that its manifest was written for")
    write(engine, made(make_manifest(), CONTENT * 2))
    refused(engine, "or the manifest is another engine's")


def test_another_version_of_tensorrt_is_refused(engine: Path) -> None:
    refused(engine, r"was built by tensorrt_rtx 1\.7\.1\.116, and here is 1\.8\.0", HERE[0], "1.8.0", HERE[2])


def test_the_other_package_is_refused(engine: Path) -> None:
    refused(engine, "is an engine of tensorrt_rtx, not of tensorrt", "tensorrt", HERE[1], HERE[2])


def test_another_gpu_is_refused(engine: Path) -> None:
    refused(engine, r"compute capability 8\.9, 12\.0, and this one has 8\.6", *HERE[:2], "8.6")
    with pytest.raises(ArtifactError, match=r"-rtx --batch 1,2:8:16 --gpu 8\.6 -o .*model\.engine --force"):
        opened(engine, *HERE[:2], "8.6")


@pytest.mark.parametrize(("capability", "gpus"), [("9.0", "H100, H200"), ("10.0", "B200")])
def test_a_gpu_that_rtx_has_no_code_for_is_named(engine: Path, capability: str, gpus: str) -> None:
    """TensorRT for RTX 1.7 has no SM90; the command is of TensorRT itself, which builds on such a GPU."""
    refused(engine, rf"TensorRT for RTX has no code for {capability} \({gpus}\)", *HERE[:2], capability)
    refused(engine, r"--format tensorrt --batch 1,2:8:16 -o", *HERE[:2], capability)


def test_an_engine_without_a_manifest_is_refused(engine: Path) -> None:
    beside = engine_file.manifest_path(engine)
    beside.unlink()
    refused(engine, r"its manifest model\.engine\.json is not beside it")
    beside.mkdir()
    refused(engine, r"model\.engine\.json: is a folder, not a regular file")
    beside.rmdir()
    os.mkfifo(beside)  # reading it would wait for ever
    refused(engine, r"model\.engine\.json: is a pipe, not a regular file")


@pytest.mark.parametrize("name", ["none.engine", "none/model.engine", "\0.engine", "."])
def test_a_missing_engine_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"no such file|no file can have such a name|is a folder"):
        read_engine_manifest(tmp_path / name)


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"engine",
    "cut short": b'{"format_version": 1, "sha256": "',
    "no text": bytes(range(128, 256)),
    "a list": b"[]",
    "nested without end": b"[" * 100_000,
    "a mebibyte and one": b" " * ((1 << 20) + 1),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_manifest_is_refused(engine: Path, kind: str) -> None:
    engine_file.manifest_path(engine).write_bytes(MALFORMED[kind])
    refused(engine, "is not a valid engine manifest|more than the 1048576 that such a file has")


CHANGES: dict[str, Any] = {
    "format_version": 1,
    "sha256": "abc",
    "bytes": 0,
    "package": "tensorrt_lean",
    "version": "",
    "gpus": [],
    "profiles": [{"min": 8, "opt": 1, "max": 16}],
    "model": {},
    "onnx_sha256": None,
    "plugin": "perhaps",
    "log": "../../etc/passwd",
    "parity": {"engine": "none"},
    "unheard_of": 1,
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_manifest_with_a_field_that_does_not_fit_is_refused(engine: Path, field: str) -> None:
    beside = engine_file.manifest_path(engine)
    beside.write_text(json.dumps({**json.loads(beside.read_text()), field: CHANGES[field]}))
    refused(engine, f"is not a valid engine manifest: {field}")


@pytest.mark.parametrize("gpu", ["8", "89", "sm_89", "8.9 ", "8.9\n", "8.10.1", "\u0668.\u0669"])
def test_a_compute_capability_is_two_numbers(make_manifest: Callable[..., Manifest], gpu: str) -> None:
    with pytest.raises(ValueError, match="gpus"):
        made(make_manifest(), gpus=(gpu,))


def test_what_was_hashed_is_what_is_returned(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is exchanged after it was checked changes nothing: it is read once."""
    reads = []
    real = os.open

    def counted(path: Any, *args: Any, **named: Any) -> Any:
        reads.append(path)
        return real(path, *args, **named)

    manifest = read_engine_manifest(engine)
    monkeypatch.setattr(os, "open", counted)
    content = read_engine(engine, manifest, "tensorrt_rtx", HERE[1], HERE[2])
    assert reads == [engine]
    engine.write_bytes(b"something else")
    assert content == CONTENT
