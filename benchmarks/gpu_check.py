"""All that only a GPU can prove, in calls of a few minutes that complete one result: `make gpu-check`.

    python benchmarks/gpu_check.py -o build/gpu.json                     # a call; the next goes on where it ended
    python benchmarks/gpu_check.py -o build/gpu.json --part torch        # of this part alone
    python benchmarks/gpu_check.py --show build/gpu.json                 # the tables

The parts are in the order of their worth, and benchmarks/README.md says what each measures. Each is a child process
that is stopped at its limit. A finding is written as soon as it is known, and is measured once. Beside the result is a
folder, FILE.caches, of what torch.compile has made: a call that finds it does not compile anew.

Without a GPU the kernels run in their host build and the other parts are skipped, by name. --device cpu rehearses: the
races of torch and ONNX Runtime too, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from gpu import plan
from gpu.findings import Findings
from gpu.session import Part, conduct, start_child, work
from gpu.survey import ROOT, facts, missing
from gpu.survey import table as survey_table
from gpu.table import table

BUDGET = 450.0  # seconds
PARTS = ("bandwidth", "kernels", "ops", *plan.RACES, "sanitizer")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "gpu.json", metavar="FILE.json")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="print the tables of a result instead")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="of this call (%(default)s)")
    parser.add_argument("--precision", nargs="+", choices=plan.PRECISIONS, default=plan.PRECISIONS)
    parser.add_argument("--networks", nargs="+", default=["cifar32", "imagenet64"], help="or paths of checkpoints")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256])
    parser.add_argument("--device", choices=("cuda:0", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("PART", "SECONDS"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def select(options: argparse.Namespace) -> tuple[Part, ...]:
    """The parts that are asked for."""
    caches = options.output.with_suffix(".caches")
    sizes = tuple(options.networks), tuple(options.batches), tuple(options.precision)
    parts = plan.parts(plan.Options(options.device, *sizes, options.work, caches))
    return tuple(part for part in parts if part.name in options.part)


def main(arguments: Sequence[str] | None = None) -> int:
    """One call; 1 where a finding failed, whatever was skipped."""
    options = parse(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return 0
    sys.path.append(str(ROOT))  # a checkout that is not installed
    findings = Findings(options.output)
    if options.child:
        (part,) = (each for each in select(options) if each.name == options.child[0])
        return work(part, findings, float(options.child[1]))
    began, what = time.monotonic(), facts()
    is_rehearsal = options.device == "cpu"
    options.device = options.device or ("cuda:0" if what["gpu"] else "cpu")
    print(survey_table(what), file=sys.stderr, flush=True)
    try:
        findings.open_run(what)
    except ValueError as error:
        sys.exit(f"gpu_check: {error}")
    with tempfile.TemporaryDirectory() as folder:
        options.work = Path(folder)
        parts = []
        for part in select(options):
            lacks = missing(part.needs, what)
            if options.device == "cpu" and not is_rehearsal and part.name != "kernels":
                lacks = ["GPU", *lacks]
            if lacks:
                findings.skip(part.name, f"missing: {', '.join(lacks)}")
            else:
                parts.append(part)
        start = partial(start_child, words=_words(options))
        conduct(parts, findings, options.budget - (time.monotonic() - began), start, time.monotonic)
    print(table(findings.content))
    return int(bool(findings.failures))


def _words(options: argparse.Namespace) -> list[str]:
    """The command line of a child, without the part."""
    words = [__file__, "-o", str(options.output), "--device", options.device, "--work", str(options.work)]
    words += ["--precision", *options.precision, "--networks", *options.networks]
    return [*words, "--batches", *map(str, options.batches)]


if __name__ == "__main__":
    sys.exit(main())
