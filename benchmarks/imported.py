r"""The cost of exporting and sampling an imported network, beside the diffusers pipeline that it came from.

    python benchmarks/imported.py --json runs/imagenet64.json                 # 296M parameters, random weights
    python benchmarks/imported.py --network lsun256 --batch 1                 # 526M parameters; export takes minutes
    python benchmarks/imported.py --folder openai/diffusers-cd_imagenet64_l2  # a folder of your own

diffusers makes and saves the model. `cm-runtime export` and `cm-runtime sample` run as commands of their own, whose
time and peak memory (the kernel's count of resident pages, files mapped into memory included) are measured from
outside. Then, in one process, the ConsistencyModelPipeline in eager torch and cm-runtime's sampler on ONNX Runtime draw
the same images from the same noise at fp32: without agreement to 1e-3 before quantisation nothing is timed. They
alternate; each round gives a ratio, and the median is reported with its extremes.

Exit status: 0 done and ours never slower; 1 slower, or a disagreement; 2 usage. Needs the dev extra (diffusers).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import cm_runtime as cm
from cm_runtime.bench import peers
from cm_runtime.bench.turns import take_turns, timer
from cm_runtime.schedule import NoiseRange
from cm_runtime.subprocesses import processor

ROOT = Path(__file__).resolve().parents[1]
GRID = 40
TIMESTEPS = {1: [0], 2: [22, 0], 4: [33, 22, 11, 0]}
AGREEMENT = 1e-3
RESNET, ATTENTION = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")


def _config(plain: int, attention: int, **options: Any) -> dict[str, Any]:
    """A UNet2DModel's options: levels without and with attention, outermost first, all resampled by residual blocks."""
    levels = [RESNET] * plain + [ATTENTION] * attention
    return {
        "down_block_types": [down for down, _ in levels],
        "up_block_types": [up for _, up in levels[::-1]],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        **options,
    }


NETWORKS = {
    "imagenet64": _config(
        1,
        3,
        sample_size=64,
        layers_per_block=3,
        num_class_embeds=1000,
        block_out_channels=[192, 384, 576, 768],
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
    ),
    "lsun256": _config(
        3,
        3,
        sample_size=256,
        layers_per_block=2,
        block_out_channels=[256, 256, 512, 512, 1024, 1024],
        attention_head_dim=64,
    ),
    "tiny": _config(1, 1, sample_size=16, layers_per_block=1, block_out_channels=[32, 64], attention_head_dim=32),
}


def save_pipeline(network: str, folder: Path) -> None:
    """A ConsistencyModelPipeline of random weights, none of them zero, as diffusers saves it."""
    diffusers = _package("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**NETWORKS[network]).requires_grad_(False)
    for tensor in unet.parameters():
        tensor += torch.randn_like(tensor) * 0.01
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=GRID)
    diffusers.ConsistencyModelPipeline(unet, scheduler).save_pretrained(folder)


def _package(name: str) -> Any:
    """A package or module without types."""
    return importlib.import_module(name)


# Run by a small process of its own: a child begins with the peak of the process that it was forked from.
WATCH = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.call([sys.executable, "-m", "cm_runtime", *sys.argv[1:]], stdout=sys.stderr)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak}))
sys.exit(status)
"""


def command(*words: object) -> dict[str, float]:
    """Run ``cm-runtime`` WORDS, its output on standard error: {seconds, peak_bytes}. Raises CalledProcessError."""
    call = [sys.executable, "-c", WATCH, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return dict(json.loads(subprocess.run(call, env=environment, stdout=subprocess.PIPE, check=True).stdout))


def pipeline(folder: Path, classes: int) -> Callable[[NDArray[np.float32], Sequence[float]], NDArray[np.float32]]:
    """(noise (K,N,C,H,W), sigmas) -> images (N,H,W,C) in [-1, 1], drawn by diffusers; label i is i mod classes."""
    drawer = peers.pipeline(folder)
    return lambda z, sigmas: drawer(z, sigmas, np.arange(z.shape[1]) % classes if classes else None)


def compare(model: Any, theirs: Callable[..., Any], batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, alternating, after one round that warms up and must agree; SystemExit where it does not."""
    sigmas = NoiseRange().from_timesteps(TIMESTEPS[steps], GRID)
    shape = model.manifest.image_shape
    z = np.stack([cm.noise.normal(0, np.arange(batch, dtype=np.uint64), k, shape) for k in range(steps)])

    def ours() -> Any:
        return cm.sample(model, noise=z, sigmas=sigmas, output="float32")

    error = float(np.abs(ours() - theirs(z, sigmas)).max())
    if not error <= AGREEMENT:
        raise SystemExit(f"error: batch {batch}, {steps} steps: the images are {error:.2g} apart; nothing is timed")
    times = take_turns({"ours": timer(ours), "theirs": timer(lambda: theirs(z, sigmas))}, range(rounds))
    ratios = [there / here for here, there in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "batch": batch,
        "steps": steps,
        "max_abs": error,
        **{f"{name}_seconds": statistics.median(each) for name, each in times.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "seconds": times,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="The file's first lines say what is measured."
    )
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="imagenet64", help="with random weights (%(default)s)")
    add("--folder", type=Path, help="a diffusers folder in place of random weights")
    add("--batch", type=int, nargs="+", default=[1, 8], help="(%(default)s)")
    add("--steps", type=int, nargs="+", choices=TIMESTEPS, default=[2], help="(%(default)s)")
    add("--rounds", type=int, default=5, help="(%(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both (%(default)s)")
    add("--work", type=Path, help="a folder to keep what is made; by default nothing is kept")
    add("--json", type=Path, help="write the figures there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as work:
        figures = _measure(options, Path(work))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(case["ratio"] >= 1 for case in figures["cases"]) else 1


def _measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = options.folder or work / "pipeline"
    if options.folder is None:
        save_pipeline(options.network, folder)
        gc.collect()
    model, images = work / "model.onnx", work / "images.npz"
    weights = sum(path.stat().st_size for path in (folder / "unet").glob("*.safetensors"))
    commands = {"export": command("export", folder, "-o", model, "--force")}
    for batch in options.batch:
        words = ["sample", model, "--batch", batch, "--steps", 2, "--threads", options.threads, "-o", images]
        commands[f"sample --steps 2 --batch {batch}"] = command(*words)
    print(f"{weights / 1e6:.0f} MB of weights, {options.threads} threads, torch {torch.__version__}")
    for name, cost in commands.items():
        print(f"{name}: {cost['seconds']:.1f} s, peak {cost['peak_bytes'] / 1e6:.0f} MB", end=" ")
        print(f"({cost['peak_bytes'] / weights:.2f} times the weights)", flush=True)
    engine = cm.load(model, threads=options.threads)
    theirs = pipeline(folder, engine.manifest.num_classes)
    cases = []
    for batch in options.batch:
        for steps in options.steps:
            case = compare(engine, theirs, batch, steps, options.rounds)
            low, high = case["ratio_range"]
            print(
                f"batch {batch}, {steps} steps: ours {case['ours_seconds']:.2f} s, diffusers"
                f" {case['theirs_seconds']:.2f} s, ratio {case['ratio']:.2f} [{low:.2f}, {high:.2f}],"
                f" {case['max_abs']:.1e} apart",
                flush=True,
            )
            cases.append(case)
    versions = {name: _package(name).__version__ for name in ("torch", "diffusers", "onnxruntime")}
    machine = {"processor": processor(), "cores": len(os.sched_getaffinity(0)), "threads": options.threads}
    return {
        "network": str(options.folder or options.network),
        "weight_bytes": weights,
        **machine,
        **versions,
        "commands": commands,
        "cases": cases,
    }


if __name__ == "__main__":
    sys.exit(main())
