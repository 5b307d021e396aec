"""The result format: the published schema, versions, and files that are not results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from bench import example_results

from cm_runtime.bench import results
from cm_runtime.bench.report import quality
from cm_runtime.errors import ArtifactError, OutputError

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "benchmarks" / "results").rglob("bench*.json"))


def test_the_published_schema_is_that_of_the_models() -> None:
    """After a change of `results`: python -c "from cm_runtime.bench.results import *; SCHEMA.write_text(schema())"."""
    assert results.SCHEMA.read_text() == results.schema()
    jsonschema.Draft202012Validator.check_schema(json.loads(results.schema()))


def test_what_is_written_fits_the_schema_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    whole = example_results.result(
        example_results.scenario(2, 8, example_results.subject(10.0, 8), example_results.peer("onnx", 11.0, 1.1))
    )
    results.write(whole, path)
    jsonschema.validate(json.loads(path.read_text()), json.loads(results.schema()))
    assert results.read(path) == whole


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_results_stay_readable(path: Path) -> None:
    found = results.read(path)
    assert found.complete and all(each.status == "measured" for each in found.scenarios)
    jsonschema.validate(json.loads(path.read_text()), json.loads(results.schema()))


@pytest.mark.process
def test_the_readmes_table_is_that_of_the_committed_results() -> None:
    assert COMMITTED
    call = [sys.executable, str(ROOT / "benchmarks" / "table.py"), *map(str, COMMITTED)]
    done = subprocess.run([*call, "--readme", str(ROOT / "README.md"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "not JSON"),
        ('{"format_version": 1, "scenarios": [', "truncated"),
        ("[1]", "no result of cm-runtime bench run"),
        ("{}", "no result of cm-runtime bench run"),
        ('{"format_version": "1", "scenarios": []}', "no result of cm-runtime bench run"),
        ('{"format_version": 2, "scenarios": [], "news": 1}', "format 2; this cm-runtime reads up to 1: update it"),
        ('{"format_version": 1, "scenarios": [], "news": 1}', ": tool: Field required|news"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_other_files(tmp_path: Path, text: str, wrong: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=wrong) as caught:
        results.read(path)
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        results.read(tmp_path / "x.json")
    with pytest.raises(ArtifactError, match="is a folder"):
        results.read(tmp_path)
    with pytest.raises(ArtifactError, match="is a device"):
        results.read("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    for reader in (results.read, quality.read):
        with pytest.raises(ArtifactError, match="is a pipe"):
            reader(tmp_path / "pipe")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ArtifactError, match="more than the 16777216"):
        results.read(tmp_path / "huge.json")


def test_unknown_keys_and_infinite_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    results.write(example_results.result(example_results.scenario(2, 8, example_results.subject(10.0, 8))), path)
    text = path.read_text()
    for before, after, wrong in (
        ('"complete"', '"completely"', "complete"),
        ('"value": 10.0', '"value": 1e999', "finite"),
    ):
        assert before in text
        path.write_text(text.replace(before, after, 1))
        with pytest.raises(ArtifactError, match=wrong):
            results.read(path)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"block_ms": [0.0] * 10}, "block_ms.0: Input should be greater"),
        ({"block_ms": [-1.0] * 10}, "block_ms.0: Input should be greater"),
        ({"block_ms": [1e-320] * 10}, "block_ms.0: Input should be greater"),
        ({"block_ms": [1e300] * 10}, "block_ms.0: Input should be less"),
        ({"block_ms": [1.0] * 10_001}, "block_ms: Tuple should have at most 10000 items"),
        ({"block_ms": ["a"] * 100_000}, "block_ms.0: Input should be a valid number"),
        ({"time_ratio": {"value": -1.0}}, "time_ratio.value"),
        ({"peak_host_bytes": 10**400}, "peak_host_bytes"),
    ],
)
def test_numbers_that_no_run_measures(tmp_path: Path, change: dict[str, object], wrong: str) -> None:
    raw = example_results.result(example_results.scenario(2, 8, example_results.subject(10.0, 8))).model_dump(
        mode="json"
    )
    raw["scenarios"][0]["contenders"][0] |= change
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=wrong) as caught:
        results.read(tmp_path / "bench.json")
    assert "scenarios.0.contenders.0." in str(caught.value)


@pytest.mark.parametrize("value", [0.0, 1e-320, -1.0, 1e300])
def test_peaks_that_no_machine_has(tmp_path: Path, value: float) -> None:
    raw = example_results.result().model_dump(mode="json")
    raw["peaks"][0]["matrix_gflop_per_s"] = {"value": value}
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"peaks\.0"):
        results.read(tmp_path / "bench.json")


def test_scenarios_have_names_of_their_own_and_are_few(tmp_path: Path) -> None:
    raw = example_results.result(example_results.scenario(2, 8)).model_dump(mode="json")
    for count, wrong in ((2, "two scenarios are called"), (1001, "at most 1000 items")):
        (tmp_path / "bench.json").write_text(json.dumps(raw | {"scenarios": raw["scenarios"] * count}))
        with pytest.raises(ArtifactError, match=wrong):
            results.read(tmp_path / "bench.json")


def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        results.write(example_results.result(), tmp_path / "missing" / "bench.json")
