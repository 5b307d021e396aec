"""The tables of a result, as text, for the page and for Markdown alike. What is missing is a dash and a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cm_runtime.bench.report.formatting import DASH, clean, digits, head, share, short, size, spread
from cm_runtime.bench.report.grouping import SetupNames, brief, rivals, subject
from cm_runtime.bench.report.quality import Quality
from cm_runtime.bench.report.table import UNMEASURED, Cell, Row, Table, estimate, plain
from cm_runtime.bench.results import Contender, Latency, Result, ScenarioResult
from cm_runtime.bench.scenario import BUNDLED, model_name

UNBOUNDED = "too few samples to bound this percentile"
RESTLESS = "the warm-up ended before two blocks in a row agreed"
NO_OPERATIONS = "the model's operations were not counted"
NO_PEAK = "no peak was measured on this device"
OTHER = "images differ: it is another model, which was allowed"
ALONE = "not compared with another implementation's images"


Field = Callable[[ScenarioResult, Contender], Cell]


def _p50(_: ScenarioResult, side: Contender) -> Cell:
    if side.latency is None:
        return Cell(DASH, note=UNMEASURED)
    cell = estimate(side.latency.p50)
    return cell if side.stable else Cell(cell.text, cell.beside, RESTLESS)


def _tail(name: str) -> Field:
    def field(_: ScenarioResult, side: Contender) -> Cell:
        latency: Latency | None = side.latency
        return Cell(DASH, note=UNMEASURED) if latency is None else estimate(getattr(latency, name), UNBOUNDED)

    return field


def cold(side: Contender) -> Cell:
    """The median of the cold starts, and their extremes."""
    middle, extremes = spread(side.cold_start_s)
    return plain(middle, beside=extremes)


def memory(side: Contender) -> Cell:
    """Peak memory of the host, and of the device where there is one."""
    device = "" if side.peak_device_bytes is None else f"GPU {size(side.peak_device_bytes)}"
    return plain(size(side.peak_host_bytes), beside=device)


def parity(side: Contender) -> Cell:
    """The largest difference, in grey levels too, and the implementation it is from."""
    if side.agreement is None:
        return Cell(DASH, note=clean(side.reason) or ALONE)
    levels = f"{digits(side.agreement.grey_levels)} of 255, from {clean(side.agreement.against, 30)}"
    return Cell(digits(float(side.agreement.max_abs), 2), levels, OTHER if side.agreement.is_allowed else "")


def name_cell(names: SetupNames, scenario: ScenarioResult) -> Cell:
    """A scenario's name in the first column."""
    return Cell(brief(scenario), names.of(scenario))


def _gflops(scenario: ScenarioResult, side: Contender) -> Cell:
    unknown = scenario.facts is None or scenario.facts.gflop is None
    return plain(digits(side.gflop_per_s), NO_OPERATIONS if unknown else UNMEASURED)


def _fraction(scenario: ScenarioResult, side: Contender) -> Cell:
    return plain(share(side.peak_fraction), _gflops(scenario, side).note or NO_PEAK)


HEADLINE: dict[str, Field] = {
    "p50, ms": _p50,
    "p90, ms": _tail("p90"),
    "p95, ms": _tail("p95"),
    "p99, ms": _tail("p99"),
    "images/s": lambda _, side: estimate(side.images_per_s),
    "cold start, s": lambda _, side: cold(side),
    "load, s": lambda _, side: plain(digits(side.load_s)),
    "peak memory": lambda _, side: memory(side),
    "outside the network": lambda _, side: plain(share(side.outside_network)),
    "GFLOP/s": _gflops,
    "of the peak": _fraction,
    "parity": lambda _, side: parity(side),
}


def headline(result: Result) -> Table:
    """cm-runtime in every scenario; of one that failed, the reason."""
    columns = dict(HEADLINE)
    if any(side.device_latency for scenario in result.scenarios if (side := subject(scenario))):
        why = "no events on this device's stream"
        columns["p50 on the device, ms"] = lambda _, side: estimate(
            side.device_latency.p50 if side.device_latency else None, why
        )
    rows, names = [], SetupNames(result)
    for scenario in result.scenarios:
        name = name_cell(names, scenario)
        side = subject(scenario)
        fields = [_failure(scenario)] if side is None else [field(scenario, side) for field in columns.values()]
        rows.append(Row((name, *fields), clean(scenario.name)))
    return Table(("scenario", *columns), tuple(rows))


def _failure(scenario: ScenarioResult) -> Cell:
    side = next((each for each in scenario.contenders if each.role == "subject"), None)
    reason = scenario.reason or (side.reason if side else "") or "no reason was recorded"
    status = side.status if scenario.status == "measured" and side else "failed"
    return Cell(f"{status}: {clean(reason)}", mark=status)


def peers(result: Result) -> Table:
    """Every side of every scenario that had more than one, or why it is not there."""
    columns = ["scenario", "side", "time over cm-runtime's", "p50, ms", "images/s"]
    columns += ["cold start, s", "load, s", "peak memory", "parity"]
    rows, names = [], SetupNames(result)
    for scenario in result.scenarios:
        if not rivals(scenario):
            continue
        name = name_cell(names, scenario)
        for side in sorted(scenario.contenders, key=lambda each: each.role != "subject"):
            who = (name, Cell(clean(side.name, 40), _version(side)))
            if side.status != "measured":
                reason = clean(side.reason or "no reason was recorded")
                rows.append(Row((*who, Cell(f"{side.status}: {reason}", mark=side.status)), clean(scenario.name)))
                continue
            ratio = Cell("1") if side.role == "subject" else estimate(side.time_ratio)
            fields = [ratio, _p50(scenario, side), estimate(side.images_per_s), cold(side)]
            fields += [plain(digits(side.load_s)), memory(side), parity(side)]
            rows.append(Row((*who, *fields), clean(scenario.name)))
    return Table(tuple(columns), tuple(rows))


def _version(side: Contender) -> str:
    words = [clean(side.version, 60), short(side.commit) if side.role == "base" else ""]
    return " ".join(word for word in words if word)


def server(result: Result) -> Table:
    """Server scenarios: latency from arrival to images, beside its bound."""
    columns = ["scenario", "arrived/s", "p50, ms", "p90, ms", "p95, ms", "p99, ms"]
    columns += ["bound of p99, ms", "kept", "drawn together"]
    rows, names = [], SetupNames(result)
    for scenario in result.scenarios:
        side = subject(scenario)
        if scenario.kind != "server" or side is None or side.served is None:
            continue
        tails = [_tail(name)(scenario, side) for name in ("p90", "p95", "p99")]
        met = Cell("yes") if side.served.met else Cell("no", mark="missed")
        arrivals, bound, batch = side.served.rate, side.served.bound_ms, side.served.mean_batch
        cells = [name_cell(names, scenario), Cell(digits(arrivals)), _p50(scenario, side), *tails]
        cells += [Cell(digits(bound)), met, Cell(digits(batch))]
        rows.append(Row(tuple(cells), clean(scenario.name)))
    return Table(tuple(columns), tuple(rows))


def models(result: Result) -> Table:
    """The models, once for each file."""
    columns = ["model", "images", "classes", "precision", "file", "GFLOP an evaluation"]
    columns += ["export parity", "export, s", "SHA-256"]
    rows: dict[tuple[str, str], Row] = {}
    for scenario in result.scenarios:
        facts = scenario.facts
        if facts is None:
            continue
        cells = [
            Cell(clean(model_name(scenario.model) if scenario.model == BUNDLED else scenario.model, 60)),
            Cell("x".join(digits(n) for n in facts.image_shape)),
            Cell(digits(facts.num_classes)),
            Cell(clean(facts.precision, 20)),
            Cell(size(facts.bytes)),
            plain(digits(facts.gflop), "its operations were not counted"),
            plain(digits(facts.export_parity, 2), "its export recorded none"),
            plain(digits(facts.export_s), "it was not exported in this run"),
            Cell(head(facts.sha256, 12)),
        ]
        rows.setdefault((scenario.model, facts.sha256), Row(tuple(cells)))
    return Table(tuple(columns), tuple(rows.values()))


def qualities(result: Result, reports: Iterable[Quality]) -> Table:
    """The figures of `cm-runtime eval`."""
    columns = ("images", "steps", "Frechet distance", "precision", "recall", "class agreement", "count", "reference")
    rows = []
    for each in reports:
        figures = each.figures
        cells = [
            Cell(each.name(result)),
            plain(digits(each.steps), "not drawn by a consistency model, as far as the report says"),
            plain(digits(figures.frechet_distance), "no reference was given"),
            plain(share(figures.precision), "needs images as the reference"),
            plain(share(figures.recall), "needs images as the reference"),
            plain(share(figures.class_agreement), "needs labels and an extractor that knows the classes"),
            Cell(digits(figures.count)),
            Cell(clean(each.reference.path.rpartition("/")[2], 40) if each.reference else DASH),
        ]
        rows.append(Row(tuple(cells)))
    return Table(columns, tuple(rows))
