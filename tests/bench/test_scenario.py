"""Suites: every combination, the quick part, names, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cm_runtime.bench.scenario import PEERS, Group, Scenario, Suite, named_suites, read_suite, title
from cm_runtime.errors import ConfigError

STANDING = Path(__file__).parents[2] / "benchmarks" / "standing.toml"


def test_every_combination_once() -> None:
    group = Group(kinds=("single-stream", "offline"), steps=(1, 2, 4), batches=(1, 7), backends=("ort", "torch"))
    found = group.scenarios()
    assert len(found) == len({each.name for each in found}) == 2 * 3 * 2 * 2
    assert found[0] == Scenario(steps=1, batch=1, backend="ort")


def test_the_quick_part() -> None:
    group = Group(steps=(1, 2), batches=(1, 8), peers=("onnx",), quick={"batches": [8], "peers": []})  # type: ignore[arg-type]
    assert [(each.steps, each.batch, each.peers) for each in group.scenarios(quick=True)] == [(1, 8, ()), (2, 8, ())]
    assert Group().scenarios(quick=True) == []


def test_the_standing_scenarios_are_those_of_the_design() -> None:
    """The standing scenarios: steps 1, 2, 4; batch 1, 8, 64, 256; imagenet64 on a CPU at batch 1 and 8 only."""
    found = read_suite(str(STANDING)).scenarios()
    single = {(each.model, each.steps, each.batch) for each in found if each.kind == "single-stream"}
    wanted = {("default", steps, batch) for steps in (1, 2, 4) for batch in (1, 8, 64, 256)}
    wanted |= {("cifar32", steps, batch) for steps in (1, 2, 4) for batch in (1, 8, 64, 256)}
    wanted |= {("imagenet64", steps, batch) for steps in (1, 2, 4) for batch in (1, 8)}
    assert single == wanted
    assert {each.kind for each in found} == {"single-stream", "offline", "server"}
    assert {peer for each in found for peer in each.peers} == set(PEERS)
    quick = read_suite(str(STANDING)).scenarios(quick=True)
    assert {each.model for each in quick} == {"default", "cifar32", "imagenet64"}
    assert {each.name for each in quick} < {each.name for each in found}


def test_shipped_suites() -> None:
    assert named_suites() == ["quick"]
    assert {each.kind for each in read_suite("quick").scenarios()} == {"single-stream", "offline", "server"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "default single-stream 2x1"),
        ({"steps": 4, "batch": 255}, "default single-stream 4x255"),
        ({"model": "runs/a b.onnx", "backend": "ort"}, "a b.onnx single-stream 2x1 ort"),
        ({"device": "cuda:1", "threads": 7}, "default single-stream 2x1 cuda:1 7 threads"),
        ({"device": "cuda:0", "precision": "tf32"}, "default single-stream 2x1 cuda:0 tf32"),
        ({"kind": "server", "rate": 2.5, "bound_ms": 100}, "default server 2x1 2.5/s"),
    ],
)
def test_names(options: dict[str, Any], name: str) -> None:
    assert Scenario(**options).name == name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "fashion-mnist single-stream, 2 steps, batch 1"),
        ({"steps": 1, "batch": 255}, "fashion-mnist single-stream, 1 step, batch 255"),
        ({"model": "runs/a 1x2 b.onnx", "backend": "ort"}, "a 1x2 b.onnx single-stream, 2 steps, batch 1, ort"),
        ({"device": "cuda:1", "threads": 7}, "fashion-mnist single-stream, 2 steps, batch 1, cuda:1 7 threads"),
        ({"kind": "server", "batch": 8, "rate": 2.5, "bound_ms": 100}, "fashion-mnist server, 2 steps, up to 8, 2.5/s"),
    ],
)
def test_titles_for_people(options: dict[str, Any], words: str) -> None:
    assert title(Scenario(**options).name) == words


def test_a_name_of_another_form_is_left_as_it_is() -> None:
    assert title("something 2x1") == "something 2x1"
    assert title(f"m offline {'9' * 6000}x1").startswith("m offline, 999")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"batch": 1 << 17}, "batch"),
        ({"threads": -1}, "threads"),
        ({"backend": "tpu"}, "backend"),
        ({"peers": ["mine"]}, "peers"),
        ({"peers": ["onnx", "onnx"]}, "twice"),
        ({"rate": 3.0}, "server"),
        ({"kind": "server"}, "rate"),
        ({"kind": "server", "rate": 3.0, "bound_ms": 3.0, "peers": ["onnx"]}, "server"),
        ({"kind": "server", "rate": 0.0, "bound_ms": 3.0}, "rate"),
        ({"speed": 3}, "speed"),
    ],
)
def test_impossible_scenarios(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        Scenario(**options)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[[group", "not valid TOML"),
        ("", "group"),
        ("[[group]]\nmode = 3", "mode"),
        ("[[group]]\nsteps = [0]", "steps"),
        ("[[group]]\nsteps = []", "a list is empty"),
        ("[[group]]\nquick = {batches = []}", "a list is empty"),
        ("[[group]]\n[[group]]", "two scenarios called 'default single-stream 2x1'"),
        ("[[group]]\nkinds = ['server']", "rate"),
        ("group = 3", "group"),
        ("a = " + "[" * 10000, "not valid TOML"),
        (f"[[group]]\nsteps = {list(range(1, 101))}\nbatches = {list(range(1, 12))}", "lists make 1100 scenarios"),
        ("".join(f"[[group]]\nmodel = '{n}'\nsteps = [1, 2, 3]\n" for n in range(334)), "over 1000 scenarios"),
        ("[[group]]\n" * 1001, "at most 1000 items"),
        ("[[group]]\nsteps = [2, 2]", "names a choice twice"),
        ("[[group]]\nrate = 1" + "0" * 5000, "rate: must be a number of fewer digits"),
        ("[[group]]\nsteps = [2, 1" + "0" * 400 + "]", "group.0.steps.1: must be a whole number of at most 64 bits"),
    ],
)
def test_bad_suites(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=wrong) as caught:
        read_suite(str(path)).scenarios()
    assert "\n" not in str(caught.value)


def test_missing_suites(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no suite nothing: .* quick"):
        read_suite("nothing")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        read_suite(str(tmp_path / "bytes.toml"))
    with pytest.raises(ConfigError, match="is a folder, not a regular file"):
        read_suite(str(tmp_path))


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "x" * 300, "a\0b"])
def test_names_of_no_file(tmp_path: Path, name: str) -> None:
    """A pipe would be waited for, and a device read without end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"not a regular file|no suite") as caught:
        read_suite(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_large_suite_is_counted_in_linear_time() -> None:
    found = Suite(group=tuple(Group(model=str(n)) for n in range(1000))).scenarios()
    assert len(found) == 1000


def test_a_precision_is_a_choice_and_decides_the_file_of_a_checkpoint() -> None:
    """OpenVINO and torch compute in it whatever the file has; ONNX Runtime in the file's types."""
    group = Group(model="cifar32", backends=("ort", "openvino", "torch"), precisions=("auto", "tf32", "bf16"))
    made = {(each.backend, each.precision): each.file_precision for each in group.scenarios()}
    assert len(made) == 9
    assert {key for key, precision in made.items() if precision != "fp32"} == {("ort", "bf16")}
    assert Scenario(precision="fp16").file_precision == "fp16"
