"""Scenarios by what ran them, and what to call both: one setup is what can share a plot."""

from __future__ import annotations

from dataclasses import dataclass

from cm_runtime.bench.report.numbers import clean, digits
from cm_runtime.bench.results import Contender, Result, ScenarioResult
from cm_runtime.bench.scenario import model_name
from cm_runtime.wording import quantity


@dataclass(frozen=True)
class Setup:
    """A model on an engine, a device and a number of threads; ``name`` says of these what differs in the result."""

    name: str
    scenarios: tuple[ScenarioResult, ...]


def subject(scenario: ScenarioResult) -> Contender | None:
    """cm-runtime's own side, if it was measured."""
    found = next((each for each in scenario.contenders if each.role == "subject"), None)
    return found if scenario.status == "measured" and found is not None and found.status == "measured" else None


def rivals(scenario: ScenarioResult) -> list[Contender]:
    """The base and the peers, measured or not."""
    return [each for each in scenario.contenders if each.role != "subject"]


def setups(result: Result) -> list[Setup]:
    """In the order of their first scenarios."""
    groups: dict[tuple[str, ...], list[ScenarioResult]] = {}
    for scenario in result.scenarios:
        groups.setdefault(_key(scenario), []).append(scenario)
    return [Setup(setup_name(result, members[0]), tuple(members)) for members in groups.values()]


def setup_name(result: Result, scenario: ScenarioResult) -> str:
    """The model's name, and what else tells its setup from the others of the result."""
    keys = {_key(each) for each in result.scenarios}
    mine = _key(scenario)
    models = {key[0] for key in keys}
    alike = [model for model in models if _short(model) == _short(mine[0])]
    words = [_short(mine[0]) if len(alike) == 1 else clean(mine[0], 60)]
    others = [key for key in keys if key[0] == mine[0]]
    words += [clean(mine[part], 30) for part in (1, 2, 3) if len({key[part] for key in others}) > 1]
    return ", ".join(words)


def brief(scenario: ScenarioResult) -> str:
    """What tells it from the others of its setup: "2 steps, batch 8"."""
    steps = quantity(scenario.steps, "step")
    if scenario.kind == "offline":
        return f"{steps}, {scenario.batch} offline"
    if scenario.kind == "server":
        found = subject(scenario)
        served = None if found is None else found.served
        rate = "server" if served is None else f"{digits(served.rate)}/s"
        return f"{steps}, {rate}, up to {scenario.batch}"
    return f"{steps}, batch {scenario.batch}"


def _key(scenario: ScenarioResult) -> tuple[str, ...]:
    return scenario.model, scenario.backend, scenario.device, quantity(scenario.threads, "thread")


def _short(model: str) -> str:
    return clean(model_name(model), 40)
