"""Verdicts: from example_results-up blocks whose truth is known, and of results that cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import example_results

from cm_runtime.bench import compare
from cm_runtime.bench import results as r
from cm_runtime.errors import RequestError


def blocks(median: float, count: int = 20, noise: float = 0.01, seed: int = 0) -> tuple[float, ...]:
    return tuple(median * np.exp(noise * np.random.default_rng(seed).standard_normal(count)))


def alone(block_ms: tuple[float, ...], drift: float = 0.0, matrix: float = 300.0, **changes: Any) -> r.Result:
    peaks = r.Peaks(
        threads=2,
        device="cpu",
        matrix_gflop_per_s=r.Estimate(value=matrix),
        copy_gb_per_s=r.Estimate(value=20),
        library="numpy",
        drift=drift,
    )
    scenario = example_results.scenario(2, 8, example_results.subject(10.0, 8, block_ms=block_ms))
    return example_results.result(scenario, peaks=(peaks,), **changes)


def pair(new: tuple[float, ...], base: tuple[float, ...]) -> r.Result:
    sides = example_results.subject(10.0, 8, block_ms=new), example_results.side(r.BASE, block_ms=base)
    return example_results.result(example_results.scenario(2, 8, *sides))


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.98, 1.02, "PASS"),
        (1.02, 1.05, "PASS"),
        (1.02, 1.051, "INCONCLUSIVE"),
        (0.9, 1.2, "INCONCLUSIVE"),
        (1.051, 1.2, "REGRESSION"),
        (1.05, 1.2, "INCONCLUSIVE"),
        (None, None, "INCONCLUSIVE"),
    ],
)
def test_the_rule(low: float | None, high: float | None, word: str) -> None:
    assert compare.judge(r.Estimate(value=1.1, low=low, high=high), 0.05) == word


def test_interleaved_builds() -> None:
    rng = np.random.default_rng(0)
    machine = np.exp(0.3 * rng.standard_normal(20))  # what both meet
    for slower, word in ((1.0, "PASS"), (1.03, "PASS"), (1.1, "REGRESSION")):
        new = tuple(slower * machine * np.exp(0.01 * rng.standard_normal(20)))
        (verdict,) = compare.compare_builds(pair(new, tuple(machine)), 0.05)
        assert verdict.word == word
        assert verdict.ratio is not None and verdict.ratio.value == pytest.approx(slower, rel=0.01)


def test_two_runs() -> None:
    base = alone(blocks(10))
    for slower, word in ((1.0, "PASS"), (1.1, "REGRESSION"), (1.045, "INCONCLUSIVE")):
        (verdict,) = compare.compare_runs(base, alone(blocks(10 * slower, seed=1)), 0.05)
        assert verdict.word == word, slower


def test_a_machine_that_was_slower_itself_decides_nothing() -> None:
    """Ten percent slower, in a run whose matrix product was ten percent slower too."""
    slow = alone(blocks(11, seed=1), matrix=272.7)
    (verdict,) = compare.compare_runs(alone(blocks(10)), slow, 0.05)
    assert verdict.word == "INCONCLUSIVE" and "9.1% apart" in verdict.reason
    (verdict,) = compare.compare_runs(alone(blocks(10)), alone(blocks(11, seed=1), drift=0.1), 0.05)
    assert verdict.word == "INCONCLUSIVE"


def test_few_blocks_decide_nothing() -> None:
    (verdict,) = compare.compare_builds(pair(blocks(20, 7), blocks(10, 7)), 0.05)
    assert verdict.word == "INCONCLUSIVE" and "only 7 blocks" in verdict.reason
    (verdict,) = compare.compare_runs(alone(blocks(10)), alone(blocks(20, 7)), 0.05)
    assert verdict.word == "INCONCLUSIVE" and "only 7 blocks" in verdict.reason


def test_different_machines_are_refused_unless_told() -> None:
    base, new = alone(blocks(10)), alone(blocks(10, seed=1))
    packages = {**new.machine.packages, "onnxruntime": "0.1"}
    other = new.model_copy(update={"machine": new.machine.model_copy(update={"packages": packages})})
    with pytest.raises(RequestError, match=r"onnxruntime: .* and 0.1"):
        compare.compare_runs(base, other, 0.05)
    (verdict,) = compare.compare_runs(base, other, 0.05, allow_different=True)
    assert verdict.word == "PASS"


def test_other_work_is_not_compared() -> None:
    base = alone(blocks(10))
    (scenario,) = base.scenarios
    for change in ({"sigmas": (80.0, 3.0)}, {"threads": 1}, {"device": "cuda:0"}):
        other = base.model_copy(update={"scenarios": (scenario.model_copy(update=change),)})
        (verdict,) = compare.compare_runs(base, other, 0.05)
        assert verdict.word == "INCONCLUSIVE" and next(iter(change)) in verdict.reason
    printed = scenario.model_copy(update={"sigmas": (80.0, 1.1200000001)})
    (verdict,) = compare.compare_runs(base, base.model_copy(update={"scenarios": (printed,)}), 0.05)
    assert verdict.ratio is not None  # the same levels, as they are printed
    larger = scenario.model_copy(update={"facts": example_results.facts(image_shape=(1, 32, 32))})
    (verdict,) = compare.compare_runs(base, base.model_copy(update={"scenarios": (larger,)}), 0.05)
    assert verdict.word == "INCONCLUSIVE" and "sizes" in verdict.reason


def test_what_one_side_lacks() -> None:
    base = alone(blocks(10))
    failed = example_results.result(
        example_results.scenario(2, 8, status="failed", reason="its images differ from those of torch by 0.3")
    )
    (verdict,) = compare.compare_runs(base, failed, 0.05)
    assert verdict.word == "REGRESSION" and "differ" in verdict.reason  # it worked before
    (verdict,) = compare.compare_runs(failed, base, 0.05)
    assert verdict.word == "INCONCLUSIVE"
    (verdict,) = compare.compare_builds(pair(blocks(10), blocks(10)), 0.05)
    assert verdict.word == "PASS"
    more = example_results.scenario(4, 8, example_results.subject(10.0, 8, block_ms=blocks(10)))
    both = base.model_copy(update={"scenarios": (*base.scenarios, more)})
    assert [each.word for each in compare.compare_runs(base, both, 0.05)] == ["PASS", "INCONCLUSIVE"]
    assert [each.word for each in compare.compare_runs(both, base, 0.05)] == ["PASS", "INCONCLUSIVE"]
    with pytest.raises(RequestError, match="share no scenario"):
        compare.compare_runs(base, example_results.result(more), 0.05)
    with pytest.raises(RequestError, match="one build only"):
        compare.compare_builds(base, 0.05)


def test_a_base_that_failed() -> None:
    sides = (
        example_results.subject(10.0, 8, block_ms=blocks(10)),
        example_results.side(r.BASE, status="failed", reason="it ended"),
    )
    (verdict,) = compare.compare_builds(example_results.result(example_results.scenario(2, 8, *sides)), 0.05)
    assert verdict.word == "INCONCLUSIVE" and "it ended" in verdict.reason
    failed = example_results.scenario(4, 8, status="failed", reason="no such model")
    both = example_results.result(example_results.scenario(2, 8, *sides), failed)
    assert [each.word for each in compare.compare_builds(both, 0.05)] == ["INCONCLUSIVE", "REGRESSION"]


def test_blocks_of_other_numbers_are_no_rounds() -> None:
    (verdict,) = compare.compare_builds(pair(blocks(10, 12), blocks(10, 20)), 0.05)
    assert verdict.word == "INCONCLUSIVE" and "12 blocks of this build and 20 of the base" in verdict.reason
    for one, other in (((), ()), ((), blocks(10))):
        assert compare.compare_builds(pair(one, other), 0.05)[0].word == "INCONCLUSIVE"
        (verdict,) = compare.compare_runs(alone(one), alone(other), 0.05)
        assert verdict.word == "INCONCLUSIVE" and verdict.ratio is None and "no block" in verdict.reason
    (verdict,) = compare.compare_runs(alone(blocks(10, 12)), alone(blocks(10, 40, seed=1)), 0.05)  # two runs may differ
    assert verdict.word == "PASS"


def test_the_farthest_apart_that_a_result_may_be() -> None:
    """Ratio, interval and drift stay finite."""
    fast, slow = alone((1e-6,) * 8 + (1e9,) * 8, matrix=1e-6), alone((1e9,) * 16, matrix=1e12)
    for base, new in ((fast, slow), (slow, fast)):
        assert compare.compare_runs(base, new, 0.05)[0].word in ("INCONCLUSIVE", "PASS", "REGRESSION")


@pytest.mark.parametrize(
    ("words", "worst"),
    [
        (["PASS"], "PASS"),
        (["PASS", "INCONCLUSIVE"], "INCONCLUSIVE"),
        (["INCONCLUSIVE", "REGRESSION", "PASS"], "REGRESSION"),
    ],
)
def test_the_worst_counts(words: list[Any], worst: str) -> None:
    assert compare.worst([compare.Verdict("x", word) for word in words]) == worst


def renamed(result: r.Result, *models: str, **facts: Any) -> r.Result:
    """The scenario of ``result`` under other models' names."""
    scenario = result.scenarios[0]
    named = [
        scenario.model_copy(
            update={
                "model": model,
                "name": f"{Path(model).name} single-stream 2x8",
                "facts": example_results.facts(**facts),
            }
        )
        for model in models
    ]
    return result.model_copy(update={"scenarios": tuple(named)})


def test_one_model_under_two_names() -> None:
    base, new = (renamed(alone(blocks(10, seed=n)), f"runs/{name}.onnx") for n, name in enumerate(("old", "new")))
    (verdict,) = compare.compare_runs(base, new, 0.05)
    assert verdict.word == "PASS" and verdict.ratio is not None
    assert compare.model_notes(base, new) == [
        "new.onnx is compared with old.onnx: each result has one model, so its name does not count"
    ]
    assert compare.model_notes(base, base) == []
    with pytest.raises(RequestError, match=r"share no scenario: the base has old.onnx single-stream, 2 steps, batch 8"):
        compare.compare_runs(base, renamed(new, "a.onnx", "b.onnx"), 0.05)  # which of them is meant is not known


@pytest.mark.parametrize(("source", "words"), [("ee" * 32, "exports of one checkpoint"), ("", "different checkpoints")])
def test_files_that_differ_are_told(source: str, words: str) -> None:
    base, new = (
        renamed(alone(blocks(10)), "model.onnx", sha256=each * 32, source_sha256=source) for each in ("ab", "cd")
    )
    (note,) = compare.model_notes(base, new)
    assert "model.onnx is abababababab, model.onnx cdcdcdcdcdcd" in note and words in note
