"""Exports on every CPU engine against diffusers' pipeline and plain exports: the table of the README.

    python benchmarks/engines.py -o benchmarks/results/MACHINE/engines.json       # measures, prints the table
    python benchmarks/engines.py --show benchmarks/results/MACHINE/engines.json   # prints the table of a result

Two steps with the same weights and noise, each contender in a process of its own, taking turns (see race.py). There are
sampler files of cm-runtime on ONNX Runtime and OpenVINO in fp32, and on OpenVINO in bf16; beside them diffusers'
pipeline in eager torch, and a plain torch.onnx.export with a NumPy loop on both engines. Images are compared before any
time is reported: fp32 within one grey level of diffusers', bf16 at 40 dB or more. The choice of `--backend auto` is
recorded after each race, and the matrix product of this machine in fp32 and bf16 before: the bound of an engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from race import Runner, Times, race

from cm_runtime import backends, export, noise
from cm_runtime.backends import auto, measurements
from cm_runtime.bench import turns
from cm_runtime.bench.flops import gflop
from cm_runtime.bench.machine import machine
from cm_runtime.bench.networks import standing_checkpoint
from cm_runtime.bench.worker import Model, Spec
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.files import atomic
from cm_runtime.manifest import read_manifest

SETUPS = (("cifar32", 1), ("cifar32", 8), ("cifar32", 64), ("imagenet64", 1), ("imagenet64", 8))
STEPS = 2
GREY, LEAST_PSNR = 1.001 * 2 / 255, 40.0
PRODUCT = 2048  # rows of the matrices whose product is timed


def measure(network: str, batch: int, folder: Path, seconds: float) -> dict[str, Any]:
    """One row: medians in ms, ratios with quartiles, and the agreement of the images."""
    source, path = standing_checkpoint(network, folder), folder / f"{network}-sampler.onnx"
    checkpoint = read_checkpoint(source)
    classes = checkpoint.config.network.num_classes
    if not path.exists():
        export.onnx(checkpoint, path, graph="sampler", steps=STEPS)
        export.onnx(checkpoint, folder / f"{network}-denoiser.onnx")
    manifest = read_manifest(path)
    (levels,) = manifest.sigmas.values()
    z = noise.normals(0, np.arange(batch, dtype=np.uint64), STEPS, manifest.image_shape)
    label = np.arange(batch) % classes if classes else None
    runners = {
        "diffusers": Runner(source, peer="diffusers"),
        "plain ort": Runner(source, peer="onnx"),
        "plain openvino": Runner(source, peer="openvino"),
        "ort": Runner(path, "ort", "fp32"),
        "openvino": Runner(path, "openvino", "fp32"),
        "openvino bf16": Runner(path, "openvino", "bf16"),
    }
    times = race(runners, z, levels, label, folder, seconds=seconds)
    reference = np.clip(times["diffusers"].images, -1, 1)
    differences = {name: _difference(each, reference) for name, each in times.items()}
    question = auto.question(path, manifest, "cpu", batch=batch)
    choice = backends.load(path, micro_batch=batch)
    best = min(("ort", "openvino"), key=lambda name: times[name].median)
    flop = STEPS * batch * gflop(folder / f"{network}-denoiser.onnx")
    return {
        "network": network,
        "batch": batch,
        "rounds": len(times["ort"].seconds),
        "ms": {name: round(each.median * 1e3, 2) for name, each in times.items()},
        "psnr": {name: round(psnr, 1) for name, (_, psnr) in differences.items()},
        "grey": {name: round(grey * 127.5, 2) for name, (grey, _) in differences.items()},
        "over diffusers": {
            name: _quartiles(times["diffusers"], times[name]) for name in ("ort", "openvino", "openvino bf16")
        },
        "over plain": {name: _quartiles(times[f"plain {name}"], times[name]) for name in ("ort", "openvino")},
        "fastest": best,
        "auto": choice.name,
        "auto measured": str(measurements.load(question) or ""),
        "gflop_per_s": {name: round(flop / times[name].median, 1) for name in ("ort", "openvino", "openvino bf16")},
    }


def _difference(times: Times, reference: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The largest difference in [-1, 1] units, and dB."""
    error = np.clip(times.images, -1, 1).astype(np.float64) - reference
    return float(np.abs(error).max()), float(10 * np.log10(4 / max(np.mean(error**2), 1e-20)))


def _quartiles(slow: Times, fast: Times) -> list[float]:
    return [round(each, 3) for each in turns.ratio(slow.seconds, fast.seconds)]


def check(row: dict[str, Any]) -> None:
    """Exit where an engine draws other images: its times are not reported."""
    for name in ("plain ort", "plain openvino", "ort", "openvino"):
        if row["grey"][name] > GREY * 127.5:
            raise SystemExit(f"{name} is {row['grey'][name]} grey levels from diffusers on {row['network']}")
    if row["psnr"]["openvino bf16"] < LEAST_PSNR:
        raise SystemExit(f"bf16 has {row['psnr']['openvino bf16']} dB on {row['network']}")


def outside(folder: Path, batch: int = 256) -> dict[str, float]:
    """The share of a request of ``batch`` images that is not the engine's: sampling's checks and noise."""
    shares = {}
    for network in ("default", "cifar32"):
        path = folder / f"{network}-sampler.onnx"
        if network == "default":
            from cm_runtime.export.from_onnx import recover

            export.onnx(recover(backends.DEFAULT_MODEL), path, graph="sampler", steps=STEPS, force=True)
        manifest = read_manifest(path)
        (levels,) = manifest.sigmas.values()
        shape, classes = manifest.image_shape, manifest.num_classes
        model = Model(Spec(str(path), "ort", "cpu", 0, batch, levels, seed=0, image_shape=shape, num_classes=classes))
        draw = turns.timer(model.prepare(0))
        model.prepare(0, count=8)()
        values = []
        for _ in range(5 if network == "default" else 1):
            model.network_ns()
            seconds = draw()
            values.append(1 - (model.network_ns() or 0) / 1e9 / seconds)
        shares[network] = round(float(np.median(values)), 4)
    return shares


def products() -> dict[str, float]:
    """GFLOP/s of torch's matrix product, the best of ten, in the types that engines compute in."""
    import torch

    rates = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(PRODUCT, PRODUCT).to(kind) for _ in range(2))
        product = turns.timer(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        rates[name] = round(2 * PRODUCT**3 / min([product() for _ in range(11)][1:]) / 1e9, 1)
    return rates


def table(result: dict[str, Any]) -> str:
    """Markdown."""

    def times(quartiles: list[float]) -> str:
        return "{:.2f}x \\[{:.2f}, {:.2f}\\]".format(*quartiles)

    lines = [
        "| two steps | diffusers, ms | ours, ms (engine) | over diffusers | over plain, ONNX Runtime |"
        " over plain, OpenVINO | bf16 over diffusers (dB) | auto |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in result["rows"]:
        best = row["fastest"]
        lines.append(
            f"| {row['network']}, batch {row['batch']} | {row['ms']['diffusers']:.5g} | {row['ms'][best]:.5g} ({best})"
            f" | {times(row['over diffusers'][best])} | {times(row['over plain']['ort'])}"
            f" | {times(row['over plain']['openvino'])}"
            f" | {times(row['over diffusers']['openvino bf16'])} ({row['psnr']['openvino bf16']:.0f})"
            f" | {row['auto']} |"
        )
    shares = ", ".join(f"{name} {share:.1%}" for name, share in result["outside"].items())
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in result["products"].items())
    lines += ["", f"{result['machine']}; matrix products: {rates}; outside the network at batch 256: {shares}."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare our exports with diffusers and plain exports on this CPU.")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="where the result goes")
    parser.add_argument("--show", type=Path, metavar="FILE.json", help="print the table of a result instead")
    parser.add_argument("--seconds", type=float, default=60, help="of each race at least (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NETWORK:BATCH", help="of the setups")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text(encoding="utf-8"))))
        return 0
    processor = machine().processor
    result: dict[str, Any] = {
        "machine": f"{processor.model}, {processor.cores} cores",
        "versions": machine().packages,
        "products": products(),
        "rows": [],
    }
    cache = atomic.cache_folder() / "bench"
    with tempfile.TemporaryDirectory() as folder:
        for network in {network for network, _ in SETUPS}:
            os.symlink(standing_checkpoint(network, cache), Path(folder) / standing_checkpoint(network, cache).name)
        for network, batch in SETUPS:
            if options.only and f"{network}:{batch}" not in options.only:
                continue
            row = measure(network, batch, Path(folder), options.seconds)
            check(row)
            result["rows"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if options.output:
                result["outside"] = {}
                options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
        result["outside"] = outside(Path(folder))
    if options.output:
        with atomic.write(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
