r"""Images a second of a training step of CD and of CT, beside a plain transcription of the algorithms.

    python benchmarks/training.py                                  # fp32 and bf16 on the CPU, without and with compile
    python benchmarks/training.py --device cuda --precision bf16 --require 2

A step is all of it: images, noise, levels, loss, backward, clipping, optimizer, averages, target. *Ours* is what
`cm-runtime train` runs (`training.stepper`). *Plain* is below: algorithms 2 and 3 of arXiv 2303.01469 in eager
torch as one writes them from the paper, with torch.randn, torch.optim.RAdam as it comes, and averages parameter by
parameter. Both train one network at one precision, batch and learning rate.

First both are given the same images, noise and levels in fp32, and loss, gradients and the target after a step must
agree; without that nothing is timed. Then they alternate, step by step, and every round gives one ratio: the median is
reported with its quartiles. ``--profile`` says where the time of a step goes.

Exit status: 0 done and every requirement met; 1 a requirement missed or a disagreement; 2 usage.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from cm_runtime.bench import turns
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.unet import UNetConfig
from cm_runtime.training.batches import Stream
from cm_runtime.training.config import CdPhase, CtPhase, TrainConfig, parse_config
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.distributed import Workers
from cm_runtime.training.noise import NOISE
from cm_runtime.training.noise_pairs import pairs_of
from cm_runtime.training.stepper import Stepper

Method = Literal["cd", "ct"]
SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5
LEARNING_RATE, CLIP, EMA, MU, N, S0, S1, MU0, STEPS = 1e-4, 10.0, 0.9999, 0.95, 40, 2, 150, 0.9, 1000

NETWORKS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {  # the bundled model's
        **{"channels": 64, "channel_mult": [1, 2], "res_blocks": 2, "attention": [7], "patch": 2},
        **{"image_size": 28, "image_channels": 1, "num_classes": 10},
    },
    "cifar32": {
        **{"channels": 128, "channel_mult": [1, 2, 2, 2], "res_blocks": 2, "attention": [16]},
        **{"image_size": 32, "image_channels": 3, "num_classes": 0},
    },
    "tiny": {
        **{"channels": 32, "channel_mult": [1, 2], "res_blocks": 1, "head_channels": 32},
        **{"image_size": 8, "image_channels": 1, "num_classes": 3},
    },
}


# The plain transcription.


def denoise(net: nn.Module, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """D(x, t) of a diffusion model (arXiv 2206.00364, eq. 7): the teacher."""
    t = t[:, None, None, None]
    c_skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    c_out = t * SIGMA_DATA / (t**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (t**2 + SIGMA_DATA**2).sqrt()
    F: Tensor = net(c_in * x, 1000 * 0.25 * torch.log(t.flatten() + 1e-44), label)
    return c_skip * x + c_out * F.float()


def consistency_function(net: nn.Module, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """f(x, t), the identity at t = 0.002 (arXiv 2303.01469, appendix C)."""
    t = t[:, None, None, None]
    c_skip = SIGMA_DATA**2 / ((t - SIGMA_MIN) ** 2 + SIGMA_DATA**2)
    c_out = (t - SIGMA_MIN) * SIGMA_DATA / (t**2 + SIGMA_DATA**2).sqrt()
    c_in = 1 / (t**2 + SIGMA_DATA**2).sqrt()
    F: Tensor = net(c_in * x, 1000 * 0.25 * torch.log(t.flatten() + 1e-44), label)
    return c_skip * x + c_out * F.float()


def grid(N: int, device: torch.device) -> Tensor:
    """t_1 < ... < t_N (arXiv 2303.01469, section 2)."""
    ramp = torch.arange(N, device=device, dtype=torch.float64) / (N - 1)
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    levels: Tensor = (low + ramp * (high - low)) ** RHO
    return levels.float()


class Plain:
    """Consistency distillation (algorithm 2, Heun) and consistency training (algorithm 3), as they are written."""

    def __init__(
        self,
        method: Method,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        batch: int,
        bf16: bool,
        learning_rate: float = LEARNING_RATE,
    ) -> None:
        self.method, self.images, self.labels, self.batch = method, images, labels, batch
        self.student = copy.deepcopy(student).train()
        self.target = copy.deepcopy(student).train().requires_grad_(False)
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.optimizer = torch.optim.RAdam(self.student.parameters(), lr=learning_rate)
        self.autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)

    def N_and_mu(self, k: int) -> tuple[int, float]:
        """Fixed for distillation; growing for training (appendix C, as in the authors' code)."""
        if self.method == "cd":
            return N, MU
        scales = math.ceil(math.sqrt(k / STEPS * ((S1 + 1) ** 2 - S0**2) + S0**2) - 1) + 1
        scales = max(scales, 2)
        return scales, math.exp(S0 * math.log(MU0) / (scales - 1))

    def loss(self, x: Tensor, label: Tensor | None, z: Tensor, n: Tensor, k: int) -> Tensor:
        """The mean squared distance over the batch."""
        levels = grid(self.N_and_mu(k)[0], x.device)
        t, r = levels[n + 1], levels[n]
        wide_t, wide_r = t[:, None, None, None], r[:, None, None, None]
        x_t = x + wide_t * z
        with torch.no_grad():
            if self.method == "cd":
                d = (x_t - denoise(self.teacher, x_t, t, label)) / wide_t
                x_r = x_t + d * (wide_r - wide_t)
                d_r = (x_r - denoise(self.teacher, x_r, r, label)) / wide_r
                x_r = x_t + (d + d_r) * (wide_r - wide_t) / 2
            else:
                x_r = x + wide_r * z
            aim = consistency_function(self.target, x_r, r, label)
        return ((consistency_function(self.student, x_t, t, label) - aim) ** 2).mean()

    def learn(self, loss: Tensor, k: int) -> float:
        """From the loss to new weights, target and average."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        mu = self.N_and_mu(k)[1]
        with torch.no_grad():
            for p, q in zip(self.target.parameters(), self.student.parameters(), strict=True):
                p.mul_(mu).add_(q, alpha=1 - mu)
            for p, q in zip(self.average.parameters(), self.student.parameters(), strict=True):
                p.mul_(EMA).add_(q, alpha=1 - EMA)
        return loss.item()

    def step(self, k: int) -> float:
        """One step of training; returns the loss."""
        index = torch.randint(len(self.images), (self.batch,), device=self.images.device)
        x = self.images[index].float() / 127.5 - 1
        label = None if self.labels is None else self.labels[index]
        z = torch.randn_like(x)
        n = torch.randint(self.N_and_mu(k)[0] - 1, (self.batch,), device=x.device)
        with self.autocast:
            loss = self.loss(x, label, z, n, k)
        return self.learn(loss, k)


# cm-runtime's step, and the two side by side.


class Ours:
    """The step of `cm-runtime train`."""

    def __init__(
        self,
        config: TrainConfig,
        student: ConsistencyModel,
        teacher: ConsistencyModel,
        data: ImageSet,
        device: torch.device,
    ) -> None:
        layout = torch.channels_last if config.channels_last else torch.contiguous_format

        def place(model: ConsistencyModel) -> ConsistencyModel:
            return copy.deepcopy(model).to(device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

        self.phase = config.phase[0]
        self.layout = layout
        self.stream = Stream(data, seed=0, classes=True, flip=False, device=device)
        self.stepper = Stepper(self.phase, config, place(student), place(teacher).eval(), Workers(0, 1, device))

    def step(self, k: int) -> float:
        """One step of training; returns the loss."""
        loss, _ = self.stepper.gradients(k, self.stream, k * self.phase.batch)
        self.stepper.update(k)
        return loss


@dataclass(frozen=True)
class Case:
    """A pair that is measured."""

    method: Method
    network: str
    batch: int
    precision: Literal["fp32", "bf16"]
    compile: bool
    channels_last: bool
    device: torch.device


def pair_of(case: Case, learning_rate: float = LEARNING_RATE) -> tuple[Ours, Plain]:
    """Ours and the transcription, with the same weights."""
    phase: dict[str, Any] = {
        "method": case.method,
        "steps": STEPS,
        "batch": case.batch,
        "learning_rate": learning_rate,
        "clip": CLIP,
        "ema": [EMA],
        "precision": case.precision,
    }
    phase |= {"N": N, "mu": MU} if case.method == "cd" else {"s0": S0, "s1": S1, "mu0": MU0}
    network = NETWORKS[case.network]
    tree = {
        "data": {"source": "random"},
        "network": {k: v for k, v in network.items() if k not in ("image_size", "image_channels", "num_classes")},
        "phase": [phase],
        "precond": "boundary",
        "init": "none",
        "compile": case.compile,
        "channels_last": case.channels_last,
    }
    config = parse_config(tree, "benchmark")
    unet = UNetConfig.model_validate(network)
    torch.manual_seed(0)
    student = _noisy(build(ModelConfig(network=unet, precond="boundary", sigma_boundary=SIGMA_MIN)))
    teacher = _noisy(build(ModelConfig(network=unet, precond="edm", sigma_boundary=0.0)))
    rng = np.random.default_rng(0)
    shape = (4 * case.batch, unet.image_channels, unet.image_size, unet.image_size)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, unet.num_classes, len(images)) if unet.num_classes else None
    data = ImageSet(images, labels, unet.num_classes, "random")
    ours = Ours(config, student, teacher, data, case.device)
    plain = Plain(
        case.method,
        student.F.to(case.device),
        teacher.F.to(case.device),
        torch.from_numpy(images).to(case.device),
        None if labels is None else torch.from_numpy(labels).to(case.device),
        case.batch,
        case.precision == "bf16",
        learning_rate,
    )
    return ours, plain


def _noisy(model: ConsistencyModel) -> ConsistencyModel:
    """Every weight moved a little, so that none is zero and no gradient is."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def disagreement(ours: Ours, plain: Plain, k: int = STEPS // 2) -> dict[str, float]:
    """The differences of step ``k`` on the same inputs: loss, gradients and movement of the target, each relative."""
    phase = ours.phase
    assert isinstance(phase, CdPhase | CtPhase)
    before = {name: p.clone() for name, p in plain.student.named_parameters()}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        loss, _ = ours.stepper.gradients(k, ours.stream, 0)
        batch = ours.stream.batch(0, phase.batch)
        t, _ = pairs_of(phase)(batch.draws, k)
        n = torch.searchsorted(grid(plain.N_and_mu(k)[0], t.device) * (1 + 1e-4), t) - 1
        z = batch.draws.normal(NOISE, batch.x.shape[1:])
        theirs = plain.loss(batch.x, batch.label, z, n.clamp(min=0), k)
        plain.learn(theirs, k)
    ours.stepper.update(k)
    weights, target = dict(ours.stepper.model.F.named_parameters()), ours.stepper.state()["target"]
    return {
        "loss": abs(loss - theirs.item()) / abs(theirs.item()),
        "gradient": _relative({name: (weights[name].grad, p.grad) for name, p in plain.student.named_parameters()}),
        "target": _relative(
            {
                name: (target[f"F.{name}"] - before[name], p - before[name])
                for name, p in plain.target.named_parameters()
            }
        ),
    }


def _relative(pairs: dict[str, tuple[Any, Any]]) -> float:
    """|a - b| / |b| over all pairs together, in float64."""
    differ = sum((a.double() - b.double()).square().sum().item() for a, b in pairs.values())
    return math.sqrt(differ / sum(b.double().square().sum().item() for _, b in pairs.values()))


def agree(differences: dict[str, float]) -> bool:
    """True where nothing is further apart than float32 rounding explains; a movement is a difference of weights."""
    return all(value <= (1e-2 if name == "target" else 1e-4) for name, value in differences.items())


@dataclass(frozen=True)
class Figures:
    """Images a second of both, medians, and the ratio: its median and quartiles."""

    ours: float
    plain: float
    ratio: tuple[float, float, float]


def measure(
    ours: Ours, plain: Plain, batch: int, rounds: int, device: torch.device, clock: Callable[[], float]
) -> Figures:
    """Alternate the two for ``rounds`` rounds, after two that warm up; every round begins with the other one."""

    def step_of(side: Ours | Plain) -> Callable[[], float]:
        k = itertools.count(STEPS // 2)

        def step() -> None:
            side.step(next(k))
            _settle(device)

        return turns.timer(step, clock)

    sides = {"ours": step_of(ours), "plain": step_of(plain)}
    turns.take_turns(sides, range(2))
    seconds = turns.take_turns(sides, range(rounds))
    mine, theirs = (batch / statistics.median(each) for each in seconds.values())
    return Figures(mine, theirs, turns.ratio(seconds["plain"], seconds["ours"]))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
KINDS = {
    "convolution": ("conv", "mkldnn", "onednn"),
    "matrix products": ("addmm", "::mm", "bmm", "matmul", "linear"),
    "attention": ("attention", "softmax"),
    "group norm": ("group_norm",),
    "optimizer, averages": ("_foreach", "lerp", "addcdiv", "addcmul", "rsqrt"),
    "compiled loops": ("cpp_fused", "triton"),
    "casts, copies, layout": ("copy_", "::_to", "contiguous", "::cat", "clone", "fill_", "zero_", "pixel"),
    "SiLU": ("silu",),
}


def profile(step: Callable[[int], float], device: torch.device) -> dict[str, float]:
    """The shares of a step's time, by kind of operation; largest first."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for k in range(2):
            step(STEPS // 2 + k)
        _settle(device)
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "the rest")
        times[kind] = times.get(kind, 0.0) + spent
    total = sum(times.values())
    return {kind: spent / total for kind, spent in sorted(times.items(), key=lambda item: -item[1])}


def _parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Images a second of a step of CD and CT, beside a plain transcription in eager torch.",
        epilog="Exit status: 0 done, 1 a requirement missed or a disagreement, 2 usage.",
    )
    add = parser.add_argument
    add("--method", nargs="+", choices=("cd", "ct"), default=["cd", "ct"])
    add("--network", choices=NETWORKS, default="fashion-mnist")
    add("--batch", type=int, default=128)
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--compile", nargs="+", choices=("off", "on"), default=["off", "on"])
    add(
        "--layout",
        choices=("auto", "nchw", "channels-last"),
        default="auto",
        help="of ours; auto: channels-last on GPUs",
    )
    add("--rounds", type=int, default=9, help="at least 2 (%(default)s)")
    add("--device", default="cpu")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: time on the cores, on a machine that others use")
    add("--threads", type=int, metavar="T", help="threads of torch")
    add("--profile", action="store_true", help="say where the time goes")
    add("--require", type=float, metavar="RATIO", help="the median ratio every case must reach")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments``, by default the process's own, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.batch < 1:
        parser.error("--rounds must be at least 2 and --batch at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    channels_last = device.type == "cuda" if options.layout == "auto" else options.layout == "channels-last"
    misses = 0
    print(f"{options.network}, batch {options.batch}, {options.device}, {torch.get_num_threads()} threads,", end=" ")
    print(f"torch {torch.__version__}, {options.clock} clock; images/s, ratio: median [quartiles]")
    for method in options.method:
        check = Case(method, options.network, min(options.batch, 32), "fp32", False, channels_last, device)
        errors = disagreement(*pair_of(check, learning_rate=100.0))  # so that the target moves by more than rounding
        print(f"{method}: apart by", ", ".join(f"{name} {value:.1e}" for name, value in errors.items()), flush=True)
        if not agree(errors):
            print("error: ours and the transcription disagree; nothing is timed")
            return 1
        for precision in options.precision:
            for switch in options.compile:
                case = Case(method, options.network, options.batch, precision, switch == "on", channels_last, device)
                ours, plain = pair_of(case)
                row = measure(ours, plain, case.batch, options.rounds, device, CLOCKS[options.clock])
                median, low, high = row.ratio
                print(
                    f"{method} {precision} compile {switch:<3}  ours {row.ours:7.1f}  plain {row.plain:7.1f}"
                    f"  ratio {median:.2f} [{low:.2f}, {high:.2f}]",
                    flush=True,
                )
                misses += options.require is not None and median < options.require
                if options.profile:
                    for name, step in (("ours", ours.step), ("plain", plain.step)):
                        shares = profile(step, device)
                        print(f"  {name}:", ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    if misses:
        print(f"missed: {misses} cases below {options.require}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
