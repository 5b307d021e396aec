"""Where a result was measured, and whether the machine kept still meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from cm_runtime.bench.report.formatting import clean, digits, head, interval, share, short, size
from cm_runtime.bench.report.grouping import subject
from cm_runtime.bench.results import Conditions, Gpu, Peaks, Processor, Result
from cm_runtime.bench.scenario import model_name
from cm_runtime.errors.wording import join_words, quantity

# Beyond these a run is said to have been disturbed, at the top.
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
    """What was measured, when, with what and on what."""
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
    """What a reader must know before any number: an unfinished run, failures, a machine that did not keep still."""
    found = []
    if not result.complete:
        done = quantity(len(result.scenarios), "scenario")
        found.append(f"This run is incomplete: it was stopped after {done}, and what it left out is not here.")
    missing = [each for each in result.scenarios if not subject(each)]
    if missing:
        found.append(f"{quantity(len(missing), 'scenario')} of {len(result.scenarios)} failed; the table says why.")
    restless = [each for each in result.scenarios if (side := subject(each)) and not side.stable]
    if restless:
        found.append(f"In {quantity(len(restless), 'scenario')} the warm-up ended before two blocks in a row agreed.")
    others = [
        side.agreement
        for each in result.scenarios
        for side in each.contenders
        if side.agreement and side.agreement.is_allowed
    ]
    if others:
        largest = max(others, key=lambda agreement: agreement.max_abs)
        found.append(f"In {quantity(len(others), 'scenario')} another model is timed beside: its {largest.text}.")
    seen = result.conditions
    if seen is not None:
        if seen.throttled:
            found.append(f"The processor throttled {digits(seen.throttled)} times, too hot for its clock.")
        if seen.gpu_throttled:
            found.append(f"The GPU was held back: {clean(', '.join(seen.gpu_throttled))}.")
        if seen.stolen is not None and seen.stolen > STOLEN:
            found.append(f"The hypervisor gave {share(seen.stolen)} of the processor time to others.")
        if seen.others is not None and seen.others > OTHERS:
            found.append(f"Other processes used {share(seen.others)} of the processor time.")
    for peak in result.peaks:
        if peak.drift is not None and abs(peak.drift) > DRIFT:
            where = clean(peak.device, 20)
            found.append(f"What the machine ({where}) can do changed by {share(abs(peak.drift))} during the run.")
    return found


def sections(result: Result) -> list[Section]:
    """The fingerprint of the machine, its packages, what it was seen to do, what it can do, and the run."""
    machine = result.machine
    found = [Section("Processor", _processor(machine.processor))]
    found += [Section("GPU", _gpu(gpu)) for gpu in machine.gpus]
    system = {"kernel": machine.kernel, "architecture": machine.architecture, "C library": machine.libc}
    system |= {"virtual machine": "yes" if machine.is_virtual else "no", "Python": machine.python}
    found.append(Section("System", _texts(system)))
    found.append(Section("Packages", _texts(dict(sorted(machine.packages.items())))))
    if result.conditions is not None:
        found.append(Section("During the run", _conditions(result.conditions)))
    found += [Section(f"Measured peak, {clean(peak.device, 20)}", _peaks(peak)) for peak in result.peaks]
    settings = result.settings
    run = {"command": result.command, "created": result.created, "commit": result.commit, "tool": result.tool}
    run |= {"time a scenario": f"{digits(settings.budget_s)} s", "seed": digits(settings.seed)}
    run |= {
        "until medians are within": f"{100 * settings.interval:g}%",
        "setting": "quick" if settings.quick else "full",
    }
    if result.samples is not None:
        run["samples"] = (
            f"{result.samples.file}, {size(result.samples.bytes)}, SHA-256 {head(result.samples.sha256, 12)}"
        )
    found.append(Section("The run", _texts(run)))
    return found


def _processor(found: Processor) -> tuple[tuple[str, str], ...]:
    facts = {"model": found.model, "cores": digits(found.cores), "memory": size(found.memory_bytes)}
    if found.sockets is not None:
        facts["sockets"] = digits(found.sockets)
    if found.limit_cores is not None:
        facts["container's limit"] = f"{digits(found.limit_cores)} cores"
    facts |= {"instructions": " ".join(found.flags), "governor": found.governor or ""}
    if found.asked_mhz is not None:
        facts["clock's limit"] = f"{digits(found.asked_mhz)} MHz"
    return _texts(facts)


def _gpu(found: Gpu) -> tuple[tuple[str, str], ...]:
    facts = {"model": found.name, "driver": found.driver, "memory": size(found.memory_bytes)}
    if found.power_limit_w is not None:
        facts["power limit"] = f"{digits(found.power_limit_w)} W"
    if found.asked_mhz is not None:
        facts["clock asked for"] = f"{digits(found.asked_mhz)} MHz"
    if found.max_mhz is not None:
        facts["highest clock"] = f"{digits(found.max_mhz)} MHz"
    return _texts(facts)


def _conditions(seen: Conditions) -> tuple[tuple[str, str], ...]:
    facts = {"duration": _duration(seen.seconds), "clock": _range(seen.mhz, "MHz")}
    facts["throttling"] = "not told" if seen.throttled is None else digits(seen.throttled)
    facts["stolen by the hypervisor"] = "not told" if seen.stolen is None else share(seen.stolen)
    facts["used by other processes"] = "not told" if seen.others is None else share(seen.others)
    facts |= {"GPU clock": _range(seen.gpu_mhz, "MHz"), "GPU temperature": _range(seen.gpu_celsius, "°C")}
    facts["GPU throttling"] = ", ".join(seen.gpu_throttled)
    return _texts(facts)


def _peaks(peak: Peaks) -> tuple[tuple[str, str], ...]:
    facts = {
        "matrix product": f"{interval(peak.matrix_gflop_per_s)} GFLOP/s",
        "copy": f"{interval(peak.copy_gb_per_s)} GB/s",
        "threads": digits(peak.threads),
        "library": peak.library,
        "drift over the run": "not told" if peak.drift is None else share(peak.drift),
    }
    return _texts(facts)


def _texts(facts: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Those that say something."""
    return tuple((clean(name, 60), clean(text)) for name, text in facts.items() if text.strip())


def _range(ends: tuple[float, float] | None, unit: str) -> str:
    return "" if ends is None else f"{digits(ends[0])} to {digits(ends[1])} {unit}"


def _duration(seconds: float) -> str:
    return f"{digits(seconds)} s" if seconds < 120 else f"{digits(seconds / 60)} min"
