"""The machine of a result, and its conditions during the run."""

from __future__ import annotations

from dataclasses import dataclass

from cm_runtime.bench.report.formatting import clean, digits, head, interval, share, short, size
from cm_runtime.bench.report.grouping import subject
from cm_runtime.bench.results import Conditions, Gpu, Peaks, Processor, Result
from cm_runtime.bench.scenario import model_name
from cm_runtime.errors.wording import join_words, quantity

# Beyond these the report warns of a disturbed run, at its top.
STOLEN = 0.02
OTHERS = 0.05
DRIFT = 0.05


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    facts: tuple[tuple[str, str], ...]


def machine_line(result: Result) -> str:
    """Intel(R) Xeon(R) Processor, 2 cores, 8.2 GB; NVIDIA H100."""
    processor = result.machine.processor
    words = [clean(processor.model, 60), quantity(processor.cores, "core"), size(processor.memory_bytes)]
    if processor.limit_cores is not None:
        words.append(f"limited to {digits(processor.limit_cores)} cores")
    if result.machine.is_virtual:
        words.append("virtual")
    gpus = [clean(gpu.name, 60) for gpu in result.machine.gpus]
    return "; ".join([", ".join(words), *gpus])


def versions_line(result: Result) -> str:
    """cm-runtime 0.1.0 (abc1234567), onnxruntime 1.32.0, Python 3.12.3."""
    commit = f" ({short(result.commit)})" if result.commit else ""
    engines = dict.fromkeys(clean(each.engine, 40) for each in result.scenarios if each.engine)
    return ", ".join([clean(result.tool, 40) + commit, *engines, f"Python {clean(result.machine.python, 20)}"])


def day(result: Result) -> str:
    """The date of the run."""
    return head(result.created, 10)


def paragraph(result: Result) -> str:
    """A summary of the measurements, the date, the software and the machine."""
    measured = [scenario for scenario in result.scenarios if subject(scenario)]
    models = list(dict.fromkeys(clean(model_name(each.model), 40) for each in result.scenarios))
    rivals = dict.fromkeys(clean(side.name, 40) for each in measured for side in each.contenders if side.time_ratio)
    seconds = None if result.conditions is None else result.conditions.seconds
    first = f"{quantity(len(measured), 'scenario')} of {quantity(len(models), 'model')} ({join_words(models)})"
    how = ", as its quick setting does it" if result.settings.quick else ""
    lines = [
        f"{first}, measured on {day(result)}{how}" + (f", in {_duration(seconds)}." if seconds is not None else "."),
        f"The software: {versions_line(result)}.",
        f"The machine: {machine_line(result)}.",
    ]
    if rivals:
        lines.append(f"Beside it, in alternation and drawing the same images: {join_words(list(rivals))}.")
    return " ".join(lines)


def troubles(result: Result) -> list[str]:
    """Warnings before any number: an unfinished run, failures, a machine that did not keep still."""
    lines = []
    if not result.complete:
        count = quantity(len(result.scenarios), "scenario")
        lines.append(f"This run is incomplete: it was stopped after {count}, and what it left out is not here.")
    failures = [each for each in result.scenarios if not subject(each)]
    if failures:
        lines.append(f"{quantity(len(failures), 'scenario')} of {len(result.scenarios)} failed; the table says why.")
    restless = [each for each in result.scenarios if (side := subject(each)) and not side.stable]
    if restless:
        lines.append(f"In {quantity(len(restless), 'scenario')} the warm-up ended before two blocks in a row agreed.")
    sides = [side for each in result.scenarios for side in each.contenders]
    others = [side.agreement for side in sides if side.agreement and side.agreement.is_allowed]
    if others:
        largest = max(others, key=lambda agreement: agreement.max_abs)
        lines.append(f"In {quantity(len(others), 'scenario')} another model is timed beside: its {largest.text}.")
    conditions = result.conditions
    if conditions is not None:
        if conditions.throttled:
            lines.append(f"The processor throttled {digits(conditions.throttled)} times, too hot for its clock.")
        if conditions.gpu_throttled:
            lines.append(f"The GPU was held back: {clean(', '.join(conditions.gpu_throttled))}.")
        if conditions.stolen is not None and conditions.stolen > STOLEN:
            lines.append(f"The hypervisor gave {share(conditions.stolen)} of the processor time to others.")
        if conditions.others is not None and conditions.others > OTHERS:
            lines.append(f"Other processes used {share(conditions.others)} of the processor time.")
    for peak in result.peaks:
        if peak.drift is not None and abs(peak.drift) > DRIFT:
            where = clean(peak.device, 20)
            lines.append(f"What the machine ({where}) can do changed by {share(abs(peak.drift))} during the run.")
    return lines


def sections(result: Result) -> list[Section]:
    """The fingerprint of the machine, its packages, its conditions, its peaks, and the run."""
    machine, settings, samples = result.machine, result.settings, result.samples
    system = {"kernel": machine.kernel, "architecture": machine.architecture, "C library": machine.libc}
    system |= {"virtual machine": "yes" if machine.is_virtual else "no", "Python": machine.python}
    run = {name: getattr(result, name) for name in ("command", "created", "commit", "tool")} | {
        "time a scenario": f"{digits(settings.budget_s)} s",
        "seed": digits(settings.seed),
        "until medians are within": f"{100 * settings.interval:g}%",
        "setting": "quick" if settings.quick else "full",
        "samples": f"{samples.file}, {size(samples.bytes)}, SHA-256 {head(samples.sha256, 12)}" if samples else "",
    }
    parts = [("Processor", _processor(machine.processor)), *(("GPU", _gpu(gpu)) for gpu in machine.gpus)]
    parts += [("System", system), ("Packages", dict(sorted(machine.packages.items())))]
    if result.conditions is not None:
        parts.append(("During the run", _conditions(result.conditions)))
    parts += [(f"Measured peak, {clean(peak.device, 20)}", _peaks(peak)) for peak in result.peaks]
    return [Section(title, _texts(facts)) for title, facts in [*parts, ("The run", run)]]


def _processor(processor: Processor) -> dict[str, str]:
    return {
        "model": processor.model,
        "cores": digits(processor.cores),
        "memory": size(processor.memory_bytes),
        "sockets": _unit(processor.sockets, ""),
        "container's limit": _unit(processor.limit_cores, "cores"),
        "instructions": " ".join(processor.flags),
        "governor": processor.governor or "",
        "clock's limit": _unit(processor.asked_mhz, "MHz"),
    }


def _gpu(gpu: Gpu) -> dict[str, str]:
    return {
        "model": gpu.name,
        "driver": gpu.driver,
        "memory": size(gpu.memory_bytes),
        "power limit": _unit(gpu.power_limit_w, "W"),
        "clock asked for": _unit(gpu.asked_mhz, "MHz"),
        "highest clock": _unit(gpu.max_mhz, "MHz"),
    }


def _conditions(conditions: Conditions) -> dict[str, str]:
    unknown = "not told"
    return {
        "duration": _duration(conditions.seconds),
        "clock": _range(conditions.mhz, "MHz"),
        "throttling": _unit(conditions.throttled, "") or unknown,
        "stolen by the hypervisor": unknown if conditions.stolen is None else share(conditions.stolen),
        "used by other processes": unknown if conditions.others is None else share(conditions.others),
        "GPU clock": _range(conditions.gpu_mhz, "MHz"),
        "GPU temperature": _range(conditions.gpu_celsius, "°C"),
        "GPU throttling": ", ".join(conditions.gpu_throttled),
    }


def _peaks(peak: Peaks) -> dict[str, str]:
    return {
        "matrix product": f"{interval(peak.matrix_gflop_per_s)} GFLOP/s",
        "copy": f"{interval(peak.copy_gb_per_s)} GB/s",
        "threads": digits(peak.threads),
        "library": peak.library,
        "drift over the run": "not told" if peak.drift is None else share(peak.drift),
    }


def _texts(facts: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """The facts that are known, as clean text."""
    return tuple((clean(name, 60), clean(text)) for name, text in facts.items() if text.strip())


def _unit(value: float | None, unit: str) -> str:
    return "" if value is None else f"{digits(value)} {unit}".rstrip()


def _range(ends: tuple[float, float] | None, unit: str) -> str:
    return "" if ends is None else f"{digits(ends[0])} to {digits(ends[1])} {unit}"


def _duration(seconds: float) -> str:
    return f"{digits(seconds)} s" if seconds < 120 else f"{digits(seconds / 60)} min"
