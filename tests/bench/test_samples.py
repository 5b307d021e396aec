"""A result and its samples: at every moment the one that is there names the other, and a finished one stays."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

import kills
import pytest
from bench import example_results

from cm_runtime.bench import results
from cm_runtime.bench.samples import NAMES, Samples
from cm_runtime.errors import OutputError


def run(output: Path, force: bool = False, scenarios: int = 2, word: str = "new") -> None:
    """A run of two scenarios, or what a kill after the first leaves."""
    one, two = (example_results.scenario(2, batch, example_results.subject(10.0, batch)) for batch in (8, 64))
    with Samples(output, force) as kept:
        for number in range(1, scenarios + 1):
            kept.write(f"{word} {number}\n")
            kept.keep(example_results.result(*(one, two)[:number], complete=False, command=word, samples=kept.sync()))
        if scenarios == 2:
            kept.keep(example_results.result(one, two, complete=True, command=word, samples=kept.sync()))


def read(output: Path) -> tuple[str, bool, int]:
    """(command, complete, scenarios) of the result, whose samples are its own."""
    found = results.read(output)
    assert found.samples is not None
    raw = (output.parent / found.samples.file).read_bytes()[: found.samples.bytes]
    assert hashlib.sha256(raw).hexdigest() == found.samples.sha256
    assert raw.decode() == "".join(f"{found.command} {n + 1}\n" for n in range(len(found.scenarios)))
    return found.command, found.complete, len(found.scenarios)


@pytest.mark.quick("a finished one")
@pytest.mark.process
@pytest.mark.parametrize("before", ["a part", "a finished one", "a finished one twice over"])
def test_a_kill_at_any_moment_leaves_a_result_with_its_own_samples(tmp_path: Path, before: str) -> None:
    old = tmp_path / "before"
    old.mkdir()
    run(old / "b.json", scenarios=1 if before == "a part" else 2, word="old")
    if before == "a finished one twice over":
        run(old / "b.json", True, word="old")
        assert {path.name for path in old.iterdir()} == {"b.json", f"b{NAMES[1]}"}
    seen = set()
    for folder in kills.folders(old, lambda folder: run(folder / "b.json", True), tmp_path):
        seen.add(read(folder / "b.json"))
        assert kills.runs(lambda folder: run(folder / "b.json", True), folder)
        assert read(folder / "b.json") == ("new", True, 2)
        assert len(list(folder.iterdir())) == 2  # no older samples, and nothing half written
    parts = {("old", False, 1), ("new", False, 1), ("new", False, 2)}
    assert seen - {("new", True, 2)} == (parts if before == "a part" else {("old", True, 2)})


def test_a_run_that_fails_leaves_a_finished_result_and_no_samples_of_its_own(tmp_path: Path) -> None:
    run(tmp_path / "b.json", word="old")
    before = kills.contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), Samples(tmp_path / "b.json", True) as kept:
        kept.write("new 1\n")
        raise KeyboardInterrupt
    assert kills.contents(tmp_path) == before


def test_without_force_nothing_is_touched(tmp_path: Path) -> None:
    run(tmp_path / "b.json", word="old")
    before = kills.contents(tmp_path)
    with pytest.raises(OutputError, match="exists; replace it with --force"):
        run(tmp_path / "b.json")
    assert kills.contents(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_one_run_at_a_time(tmp_path: Path, name: str, before: int) -> None:
    """Under whichever name it writes, and whatever result is there."""
    if before:
        run(tmp_path / "b.json", scenarios=before)
    with (tmp_path / f"b{name}").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="being written by another run"):
            run(tmp_path / "b.json", True)
    run(tmp_path / "b.json", True)


@pytest.mark.parametrize("content", ["{", '{"format_version": 2, "scenarios": []}'])
def test_a_result_that_cannot_be_read_is_replaced_by_a_finished_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.json").write_text(content)
    (tmp_path / f"b{NAMES[0]}").write_text("its own\n")
    with pytest.raises(KeyboardInterrupt), Samples(tmp_path / "b.json", True):
        raise KeyboardInterrupt
    assert kills.contents(tmp_path) == {"b.json": content.encode(), f"b{NAMES[0]}": b"its own\n"}
    run(tmp_path / "b.json", True)
    assert read(tmp_path / "b.json") == ("new", True, 2)
