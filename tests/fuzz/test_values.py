"""Any JSON in the place of what people and files say: taken, or refused in one line of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cm_runtime.bench import results
from cm_runtime.bench.report import quality
from cm_runtime.errors import CmRuntimeError
from cm_runtime.manifest import Manifest, parse_manifest
from cm_runtime.request import Draw, sampling_request
from cm_runtime.training.config import parse_config

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 2**64, 10**400, 1e308, 1e-320])
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLAIN = {"graph": "denoiser", "image_shape": [1, 3, 7], "num_classes": 4, "precond": "edm", "sigma_boundary": 0}
RUN = {
    "data": {"source": "toy"},
    "network": {"channels": 32, "channel_mult": [1], "res_blocks": 1},
    "phase": [{"method": "ect", "steps": 3, "batch": 4, "learning_rate": 1e-3, "ema": [0.5], "stages": 3}],
}


def one_line(act: Callable[[], Any]) -> Any:
    """What ``act`` gives, or None where it was refused as it should be."""
    try:
        return act()
    except CmRuntimeError as error:
        assert str(error).strip() and "\n" not in str(error)
        return None


@pytest.mark.process
@QUICK
@given(st.dictionaries(st.sampled_from(sorted(Manifest.model_fields)), JSON, max_size=3))
def test_manifests(changes: dict[str, Any]) -> None:
    text = json.dumps(PLAIN | changes)
    manifest = one_line(lambda: parse_manifest(text, "x.onnx"))
    if manifest is not None:
        assert parse_manifest(manifest.model_dump_json(), "x.onnx") == manifest


@QUICK
@given(st.sampled_from(["data", "network", "phase.0", ""]), st.text(max_size=10) | st.just("steps"), JSON)
def test_training_configurations(place: str, key: str, value: Any) -> None:
    tree: Any = json.loads(json.dumps(RUN))
    node = tree["phase"][0] if place == "phase.0" else tree[place] if place else tree
    node[key] = value
    one_line(lambda: parse_config(tree, "toy.toml"))


@QUICK
@given(st.sampled_from(sorted(RUN["phase"][0])), JSON)
def test_values_of_a_phase(key: str, value: Any) -> None:
    tree: Any = json.loads(json.dumps(RUN))
    tree["phase"][0][key] = value
    one_line(lambda: parse_config(tree, "toy.toml"))


@QUICK
@given(JSON)
def test_results_and_reports(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(value))
    one_line(lambda: results.read(path))
    one_line(lambda: quality.read(path))


@QUICK
@given(JSON | st.sets(st.integers()) | st.binary(max_size=4))
def test_labels(value: Any) -> None:
    chosen = one_line(lambda: sampling_request(Manifest(**PLAIN), Draw(count=4, labels=value, micro_batch=2)))
    if chosen is not None and value is not None and not isinstance(value, str | dict):
        given_labels = value if isinstance(value, list) else [value]
        assert all(type(each) is int and 0 <= each < 4 for each in given_labels)


@pytest.mark.parametrize("option", ["count", "steps", "seed", "start", "sigmas", "micro_batch", "output"])
@QUICK
@given(value=JSON)
def test_requests(option: str, value: Any) -> None:
    arguments = {"count": 4, "micro_batch": 2} | {option: value}
    one_line(lambda: sampling_request(Manifest(**PLAIN), Draw(count=arguments.pop("count"), **arguments)))
