"""Group scenarios that belong in one plot (same model, engine, device, threads), and label the groups."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cm_runtime.bench.report.formatting import clean, digits
from cm_runtime.bench.results import Contender, Result, ScenarioResult
from cm_runtime.bench.scenario import model_name
from cm_runtime.errors.wording import quantity


@dataclass(frozen=True)
class Setup:
    """A model on an engine, a device and a number of threads; ``name`` has those of them that differ in the result."""

    name: str
    scenarios: tuple[ScenarioResult, ...]


def subject(scenario: ScenarioResult) -> Contender | None:
    """cm-runtime's own side, if it was measured."""
    sides = (each for each in scenario.contenders if each.role == "subject" and each.status == "measured")
    return next(sides, None) if scenario.status == "measured" else None


def rivals(scenario: ScenarioResult) -> list[Contender]:
    """The base and the peers, measured or not."""
    return [each for each in scenario.contenders if each.role != "subject"]


def setups(result: Result) -> list[Setup]:
    """In the order of their first scenarios."""
    groups: dict[tuple[str, ...], list[ScenarioResult]] = {}
    for scenario in result.scenarios:
        groups.setdefault(_key(scenario), []).append(scenario)
    names = SetupNames(result)
    return [Setup(names.of(members[0]), tuple(members)) for members in groups.values()]


class SetupNames:
    """Names of the setups of a result: the model's, and the parts that differ between its setups."""

    def __init__(self, result: Result) -> None:
        keys = {_key(each) for each in result.scenarios}
        self._alike = Counter(_short(model) for model in {key[0] for key in keys})
        self._variants: dict[str, list[set[str]]] = {}
        for model, *parts in keys:
            for values, part in zip(self._variants.setdefault(model, [set(), set(), set(), set()]), parts, strict=True):
                values.add(part)

    def of(self, scenario: ScenarioResult) -> str:
        """The name of the setup that ``scenario`` belongs to."""
        model, *parts = _key(scenario)
        words = [_short(model) if self._alike[_short(model)] == 1 else clean(model, 60)]
        variants = self._variants[model]
        words += [clean(part, 30) for part, values in zip(parts, variants, strict=True) if len(values) > 1]
        return ", ".join(words)


def brief(scenario: ScenarioResult) -> str:
    """A scenario's name within its setup: "2 steps, batch 8"."""
    steps = quantity(scenario.steps, "step")
    if scenario.kind == "offline":
        return f"{steps}, {scenario.batch} offline"
    if scenario.kind == "server":
        side = subject(scenario)
        rate = f"{digits(side.served.rate)}/s" if side and side.served else "server"
        return f"{steps}, {rate}, up to {scenario.batch}"
    return f"{steps}, batch {scenario.batch}"


def _key(scenario: ScenarioResult) -> tuple[str, ...]:
    threads = quantity(scenario.threads, "thread")
    return scenario.model, scenario.backend, scenario.device, scenario.precision, threads


def _short(model: str) -> str:
    return clean(model_name(model), 40)
