"""The gate: verdicts on whether one build is slower than another by more than is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cm_runtime.bench import machine, stats
from cm_runtime.bench.results import BASE, SUBJECT, Contender, Estimate, Peaks, Result, ScenarioResult
from cm_runtime.bench.scenario import model_name, title
from cm_runtime.errors import RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.schedule import level_text, same_levels

Word = Literal["PASS", "REGRESSION", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Verdict:
    """ratio: the new build's median time over the base's; reason: where it is not the ratio that decided."""

    scenario: str
    word: Word
    ratio: Estimate | None = None
    reason: str = ""


def judge(ratio: Estimate, gate: float) -> Word:
    """REGRESSION: all of the interval is above 1 + gate. PASS: none of it. INCONCLUSIVE: some, or there is none."""
    if ratio.low is None or ratio.high is None:
        return "INCONCLUSIVE"
    if ratio.low > 1 + gate:
        return "REGRESSION"
    return "PASS" if ratio.high <= 1 + gate else "INCONCLUSIVE"


def worst(verdicts: Sequence[Verdict]) -> Word:
    """The worst."""
    words = {each.word for each in verdicts}
    return "REGRESSION" if "REGRESSION" in words else "INCONCLUSIVE" if "INCONCLUSIVE" in words else "PASS"


def compare_builds(result: Result, gate: float) -> list[Verdict]:
    """Verdicts of a run with ``--against``, which took turns with its base. Raises RequestError for another run."""
    if not any(each.contender(BASE) for each in result.scenarios):
        raise RequestError("this result holds one build only: give two results, or measure with bench run --against")
    return [_of_pair(each, each.contender(SUBJECT), each.contender(BASE), gate) for each in result.scenarios]


def model_notes(base: Result, new: Result) -> list[str]:
    """Sentences on models that have two names, or two files; `compare_runs` compares them all the same."""
    sentences: dict[str, None] = {}
    for before, after in _pairs(base, new):
        if before is None or after is None:
            continue
        one, other = model_name(before.model), model_name(after.model)
        if one != other:
            sentences[f"{other} is compared with {one}: each result has one model, so its name does not count"] = None
        if before.facts and after.facts and before.facts.sha256 != after.facts.sha256:
            files = f"the files differ: {one} is {before.facts.sha256[:12]}, {other} {after.facts.sha256[:12]}"
            source = before.facts.source_sha256
            is_one = source and source == after.facts.source_sha256
            sentences[f"{files}, {'exports of one checkpoint' if is_one else 'of different checkpoints'}"] = None
    return list(sentences)


def _pairs(base: Result, new: Result) -> list[tuple[ScenarioResult | None, ScenarioResult | None]]:
    """The scenarios of both by name, the base's first; where each result has one model, without that model's name."""
    is_alone = all(len({each.model for each in result.scenarios}) == 1 for result in (base, new))

    def key(each: ScenarioResult) -> str:
        return each.name.removeprefix(f"{Path(each.model).name} ") if is_alone else each.name

    after = {key(each): each for each in new.scenarios}
    before = {key(each): each for each in base.scenarios}
    pairs = [(each, after.get(name)) for name, each in before.items()]
    return [*pairs, *((None, each) for name, each in after.items() if name not in before)]


def compare_runs(base: Result, new: Result, gate: float, allow_different: bool = False) -> list[Verdict]:
    """Verdicts of two runs, scenario by scenario of the base.

    The change of the machine's matrix product between them, or within either, widens the intervals. Raises
    RequestError where the runs are of different machines or packages, unless that is allowed, or share no scenario.
    """
    if not allow_different and (lines := "; ".join(machine.differences(base.machine, new.machine))):
        raise RequestError(f"the results are of different machines: {lines} (--allow-different compares them)")
    pairs = _pairs(base, new)
    if not any(before and after for before, after in pairs):
        raise RequestError(
            f"the results share no scenario: the base has {_names(base)}, the new one {_names(new)}"
            " (--scenario of bench run measures one of them again)"
        )
    verdicts = [_between(before, after, base, new, gate) for before, after in pairs if before]
    others = [after.name for before, after in pairs if after and not before]
    return [*verdicts, *(Verdict(name, "INCONCLUSIVE", reason="the base has no such scenario") for name in others)]


def _names(result: Result) -> str:
    """The first three."""
    names = [title(each.name) for each in result.scenarios]
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _of_pair(scenario: ScenarioResult, new: Contender | None, base: Contender | None, gate: float) -> Verdict:
    name = scenario.name
    if new is None or new.status != "measured":
        reason = scenario.reason or (new.reason if new else "")
        return Verdict(name, "REGRESSION", reason=f"this build could not be measured: {reason}")
    if base is None or base.status != "measured":
        return Verdict(name, "INCONCLUSIVE", reason=f"no base: {base.reason if base else 'it was not measured'}")
    if len(new.block_ms) != len(base.block_ms):
        counts = f"{quantity(len(new.block_ms), 'block')} of this build and {len(base.block_ms)} of the base"
        return Verdict(name, "INCONCLUSIVE", reason=f"{counts}: the two did not take turns")
    if not new.block_ms:
        return Verdict(name, "INCONCLUSIVE", reason="the result holds no block of either build")
    ratio = stats.ratio(new.block_ms, base.block_ms)
    differs = base.agreement.text if base.agreement and base.agreement.is_allowed else ""
    reasons = [reason for reason in (_too_few(len(new.block_ms)), differs) if reason]
    return Verdict(name, judge(ratio, gate), ratio, "; ".join(reasons))


def _between(base: ScenarioResult, new: ScenarioResult | None, old: Result, late: Result, gate: float) -> Verdict:
    before = base.contender(SUBJECT)
    if before is None or before.status != "measured":
        return Verdict(base.name, "INCONCLUSIVE", reason="the base could not be measured")
    if new is None:
        reason = "it was left out" if late.complete else "the run ended before it"
        return Verdict(base.name, "INCONCLUSIVE", reason=f"not in the new result: {reason}")
    after = new.contender(SUBJECT)
    if after is None or after.status != "measured":
        return Verdict(base.name, "REGRESSION", reason=f"it can no longer be measured: {new.reason}")
    if not same_levels(base.sigmas, new.sigmas):
        levels = f"sigmas {level_text(base.sigmas)} and {level_text(new.sigmas)}"
        return Verdict(base.name, "INCONCLUSIVE", reason=f"not the same work: {levels}")
    for name in ("device", "threads"):
        one, other = getattr(base, name), getattr(new, name)
        if one != other:
            return Verdict(base.name, "INCONCLUSIVE", reason=f"not the same work: {name} {one} and {other}")
    if base.facts and new.facts and base.facts.image_shape != new.facts.image_shape:
        return Verdict(base.name, "INCONCLUSIVE", reason="not the same work: the images are of different sizes")
    fewest = min(len(after.block_ms), len(before.block_ms))
    if not fewest:
        return Verdict(base.name, "INCONCLUSIVE", reason="a result holds no block of it")
    drift = _drift(_peaks(base, old), _peaks(new, late))
    ratio = stats.unpaired_ratio(after.block_ms, before.block_ms, drift)
    return Verdict(
        base.name, judge(ratio, gate), ratio, _too_few(fewest) or f"the machine's own speed: {drift:.1%} apart"
    )


def _too_few(blocks: int) -> str:
    return f"only {quantity(blocks, 'block')}; give it a larger --budget" if blocks < stats.FEWEST_BLOCKS else ""


def _peaks(scenario: ScenarioResult, result: Result) -> Peaks | None:
    place = scenario.threads, scenario.device
    return next((each for each in result.peaks if (each.threads, each.device) == place), None)


def _drift(base: Peaks | None, new: Peaks | None) -> float:
    if base is None or new is None:
        return 0.0
    change = abs(new.matrix_gflop_per_s.value / base.matrix_gflop_per_s.value - 1)
    return max(change, base.drift or 0.0, new.drift or 0.0)
