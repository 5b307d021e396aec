"""The whole loop: what it computes, that it can be stopped, killed and resumed anywhere, and how it fails."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import assert_same, left_behind, log_of, pt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from cm_runtime import noise
from cm_runtime.backends.torch import find_device
from cm_runtime.checkpoints.native import read_checkpoint
from cm_runtime.errors import CheckpointError, CmRuntimeError, EngineError, Interrupted, OutputError, TrainingError
from cm_runtime.files import atomic
from cm_runtime.training import loop, provenance, second_points, stepper
from cm_runtime.training.config import TrainConfig, parse_config
from cm_runtime.training.data import open_data
from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.loop import Observer, Report, model_config_of, train
from cm_runtime.training.losses import Batch, Loss
from cm_runtime.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread", "quick_grids")

Config = Callable[..., TrainConfig]
TINY_NETWORK = {"channels": 32, "channel_mult": [1, 2], "res_blocks": 1, "head_channels": 32}
EXCERPT = Path(__file__).parents[1] / "data" / "fashion-mnist"


@dataclass
class Seen:
    """What a loss was called with."""

    method: str
    weights: dict[str, Tensor]
    batch: Batch
    k: int


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Fills with every call of a loss, the weights before the step included."""
    calls: list[Seen] = []
    loss_of = stepper.loss_of

    def remembering(phase: Any, *parts: Any) -> Loss:
        loss = loss_of(phase, *parts)

        def called(student: nn.Module, target: nn.Module, batch: Batch, k: int) -> Tensor:
            weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
            calls.append(Seen(phase.method, weights, batch, k))
            return loss(student, target, batch, k)

        return called

    monkeypatch.setattr(stepper, "loss_of", remembering)
    return calls


# one step


@pytest.mark.process
@pytest.mark.parametrize("clip", [1e-2, 1e6])
def test_the_first_step_is_the_clipped_gradient_times_the_learning_rate(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, seen: list[Seen], clip: float
) -> None:
    # RAdam's first steps are plain gradient descent; warm-up of 4 makes the rate a quarter of 0.02
    config = tiny_config(phases=1, edm={"steps": 1, "learning_rate": 0.02, "warmup": 4, "clip": clip})
    train(config, toy_images, tmp_path)
    after, norm = pt(tmp_path / "state.pt")["model"], log_of(tmp_path)[0]["gradient_norm"]
    moved = math.sqrt(sum((after[k] - v).double().square().sum().item() for k, v in seen[0].weights.items()))
    assert 1e-2 < norm < 1e6
    assert moved == pytest.approx(0.005 * min(clip, norm), rel=1e-4)


# a run


@pytest.mark.process
def test_averages_follow_the_weights_and_a_phase_starts_from_those_of_the_one_before(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, seen: list[Seen]
) -> None:
    config = tiny_config(edm={"steps": 6, "ema": [0.3, 0.9]}, ect={"steps": 5, "ema": [0.2]})
    train(config, toy_images, tmp_path)
    assert [call.method for call in seen] == ["edm"] * 6 + ["ect"] * 5
    first = pt(tmp_path / "phase-0-edm.pt")
    assert first["default_ema"] == "0.3" and list(first["ema"]) == ["0.3", "0.9"]
    assert all(torch.equal(seen[6].weights[name], tensor) for name, tensor in first["ema"]["0.3"].items())
    state = pt(tmp_path / "state.pt")
    history = [*(call.weights for call in seen[6:]), state["model"]]
    for name, found in pt(tmp_path / "ckpt.pt")["ema"]["0.2"].items():
        average = history[0][name].double().numpy()
        for k, weights in enumerate(history[1:]):
            keep = min(0.2, (1 + k) / (10 + k))
            average = keep * average + (1 - keep) * weights[name].double().numpy()
        np.testing.assert_allclose(found.double().numpy(), average, rtol=1e-5, atol=1e-7)
        assert torch.equal(state["ema"]["0.2"][name], found)


@pytest.mark.process
def test_phases_walk_on_through_the_data(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, seen: list[Seen]
) -> None:
    config = tiny_config(edm={"steps": 5, "batch": 12}, ect={"steps": 8, "batch": 5})
    train(config, toy_images, tmp_path)
    walked = np.rint((torch.cat([call.batch.x for call in seen]).numpy() + 1) * 127.5).astype(np.uint8)
    labels = torch.cat([call.batch.label for call in seen if call.batch.label is not None]).numpy()
    order = [int(np.flatnonzero((toy_images.images == image).all((1, 2, 3)))[0]) for image in walked]
    assert len(order) == 100 and sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert toy_images.labels is not None and (labels == toy_images.labels[order]).all()
    assert [call.k for call in seen] == [*range(5), *range(8)]
    assert torch.cat([call.batch.draws.place for call in seen]).tolist() == list(range(100))


@pytest.mark.process
def test_every_step_of_every_phase_and_seed_has_its_own_randomness(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, seen: list[Seen]
) -> None:
    for seed in (0, 1, 0):
        train(tiny_config(seed=seed), toy_images, tmp_path, force=True)
    draws = [tuple(call.batch.draws.normal(0).tolist()) for call in seen]
    assert draws[:6] == draws[12:]
    assert len({z for one in draws[:12] for z in one}) == 12 * 4


@pytest.mark.process
def test_every_step_is_reported_and_every_tenth_is_logged(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    config = tiny_config(
        edm={"steps": 23, "batch": 2, "warmup": 30, "learning_rate": 3e-3}, ect={"steps": 10, "batch": 3}
    )
    reports: list[Report] = []
    assert train(config, toy_images, tmp_path, observer=Observer(step=reports.append)) == tmp_path / "ckpt.pt"
    assert [(r.phase, r.method, r.step, r.steps) for r in reports] == [
        *((0, "edm", step, 23) for step in range(1, 24)),
        *((1, "ect", step, 10) for step in range(1, 11)),
    ]
    assert all(math.isfinite(r.loss) and r.images_per_second > 0 for r in reports)
    lines = log_of(tmp_path)
    assert [(line["phase"], line["method"], line["step"], line["images"]) for line in lines] == [
        (0, "edm", 10, 20),
        (0, "edm", 20, 40),
        (0, "edm", 23, 46),
        (1, "ect", 10, 76),
    ]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 2e-3, 2.3e-3, 1e-3])
    losses = {(r.phase, r.step): r.loss for r in reports}
    assert [line["loss"] for line in lines] == [losses[line["phase"], line["step"]] for line in lines]
    assert all(line["gradient_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    summary = read_checkpoint(tmp_path / "ckpt.pt").training
    assert (summary.method, summary.data, summary.steps, summary.images) == ("ect", "toy", 33, 76)
    assert summary.config["seed"] == 0 and "source" not in summary.config["data"]
    teacher = read_checkpoint(tmp_path / "phase-0-edm.pt").training
    assert (teacher.method, teacher.steps, teacher.images) == ("edm", 23, 46)


@pytest.mark.process
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grids_are_pictures_of_the_right_size_at_the_right_steps(
    tmp_path: Path,
    tiny_config: Config,
    toy_images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    mode: str,
) -> None:
    monkeypatch.setattr(loop, "GRID_IMAGES", 7)
    data = ImageSet(np.repeat(toy_images.images, channels, 1), toy_images.labels, 3, "toy")
    train(tiny_config(sample_every=2), data, tmp_path)
    grids = sorted((tmp_path / "samples").iterdir())
    names = ["0-edm-000002", "0-edm-000003", "1-ect-000002", "1-ect-000003"]
    assert [grid.name for grid in grids] == [f"{name}.png" for name in names]
    for grid in grids:
        assert grid.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        with Image.open(grid) as picture:
            picture.load()
            assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (24, 24))
            assert np.asarray(picture).std() > 1
            assert json.loads(picture.text["cm_runtime"])["seed"] == 0  # type: ignore[attr-defined]
    with Image.open(grids[-1]) as picture:
        assert (np.asarray(picture)[16:, 8:] == 0).all()  # 7 of 9 cells are filled


def test_a_run_draws_64_images_in_a_grid() -> None:
    import importlib

    spec = importlib.util.find_spec("cm_runtime.training.loop")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)  # the fixture has changed the other one
    assert fresh.GRID_IMAGES == 64


def cells(path: Path) -> np.ndarray:
    """The 4 images of an 8x8 grid: (4, 8, 8) float64 grey levels."""
    with Image.open(path) as picture:
        return np.asarray(picture, np.float64).reshape(2, 8, 2, 8).swapaxes(1, 2).reshape(4, 8, 8)


@pytest.mark.process
def test_grids_are_what_the_averaged_weights_draw_from_the_seeds_noise(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    # steps large enough that the network says something; the samplers are written out here in float64
    config = tiny_config(edm={"steps": 8, "learning_rate": 0.02}, ect={"steps": 4}, seed=5)
    train(config, toy_images, tmp_path)
    label = torch.tensor([0, 1, 2, 0])

    def f(name: str) -> Callable[[np.ndarray, float], np.ndarray]:
        model = read_checkpoint(tmp_path / name).model()

        def call(x: np.ndarray, sigma: float) -> np.ndarray:
            with torch.no_grad():
                found = model(torch.from_numpy(x.astype(np.float32)), torch.full((4,), sigma), label)
            return np.asarray(found.double().numpy())

        return call

    def grey(x0: np.ndarray) -> np.ndarray:
        return np.rint((np.clip(x0[:, 0], -1, 1) + 1) * 127.5)

    z0, z1 = (noise.normal(5, np.arange(4), draw, (1, 8, 8)).astype(np.float64) for draw in (0, 1))
    # Heun over 80, 0.002 and 0: one step with correction, one without
    D, x = f("phase-0-edm.pt"), 80 * z0
    slope = (x - D(x, 80.0)) / 80
    euler = x + (0.002 - 80) * slope
    x = x + (0.002 - 80) * (slope + (euler - D(euler, 0.002)) / 0.002) / 2
    teacher = grey(D(x, 0.002))
    assert np.abs(cells(tmp_path / "samples" / "0-edm-000008.png") - teacher).max() <= 1
    # two steps of the consistency sampler, the second at the middle of the Karras grid of three
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert middle == pytest.approx(2.5152, abs=1e-4)
    student, x0 = f("ckpt.pt"), np.clip(f("ckpt.pt")(80 * z0, 80.0), -1, 1)
    drawn = grey(student(x0 + math.sqrt(middle**2 - 0.002**2) * z1, middle))
    assert np.abs(cells(tmp_path / "samples" / "1-ect-000004.png") - drawn).max() <= 1
    assert np.abs(drawn - teacher).max() > 1  # so the two are not the same picture


@pytest.mark.process
@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_checkpoints_are_stored_as_asked(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, weights: str
) -> None:
    train(tiny_config(weights=weights), toy_images, tmp_path)
    exact = pt(tmp_path / "state.pt")["ema"]["0.5"]
    for name, tensor in pt(tmp_path / "ckpt.pt")["ema"]["0.5"].items():
        assert tensor.dtype == getattr(torch, weights) and exact[name].dtype == torch.float32
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
    model = read_checkpoint(tmp_path / "ckpt.pt").model()
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.process
@pytest.mark.parametrize("form", ["edm", "boundary", "piecewise"])
def test_every_form_of_preconditioning_trains(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, form: str
) -> None:
    train(tiny_config(precond=form, sigma_data=0.6), toy_images, tmp_path)
    found = read_checkpoint(tmp_path / "ckpt.pt").config
    assert (found.precond, found.sigma_data) == (form, 0.6)
    assert found.sigma_boundary == (0.0 if form == "edm" else 0.002)


@pytest.mark.process
def test_images_without_labels_make_a_model_without_classes(tmp_path: Path, tiny_config: Config) -> None:
    data = ImageSet(np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8)).astype(np.uint8), None, 0, "bare")
    train(tiny_config(), data, tmp_path)
    assert read_checkpoint(tmp_path / "ckpt.pt").config.network.num_classes == 0


@pytest.mark.process
def test_images_of_any_number_of_channels_train_or_are_refused_before_the_run(
    tmp_path: Path, tiny_config: Config
) -> None:
    data = ImageSet(np.zeros((9, 2, 8, 8), np.float32), None, 0, "two channels")
    try:
        train(tiny_config(), data, tmp_path / "run")
    except TrainingError:
        assert not (tmp_path / "run").exists()
    else:
        assert read_checkpoint(tmp_path / "run" / "ckpt.pt").config.image_shape == (2, 8, 8)


@pytest.mark.process
def test_another_thread_can_train(tmp_path: Path, tiny_config: Config, toy_images: ImageSet) -> None:
    config = tiny_config(phases=1)
    train(config, toy_images, tmp_path / "main")
    thread = threading.Thread(target=train, args=(config, toy_images, tmp_path / "thread"))
    thread.start()
    thread.join()
    assert_same(left_behind(tmp_path / "thread"), left_behind(tmp_path / "main"))


# learning


@pytest.mark.process
def test_the_loss_on_real_images_falls(tmp_path: Path, tiny_config: Config) -> None:
    config = tiny_config(
        edm={"steps": 40, "batch": 16, "learning_rate": 3e-3, "ema": [0.9], "P_mean": -1.0, "P_std": 1.4},
        network={"patch": 2},
        phases=1,
    )
    losses: list[float] = []
    train(config, open_data(EXCERPT), tmp_path, observer=Observer(step=lambda r: losses.append(r.loss)))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.slow
@pytest.mark.process
def test_gaussian_data_teach_the_exact_denoiser_and_then_ects_fixed_point(
    tmp_path: Path, tiny_config: Config, ect_fixed_point: Callable[[Tensor, float, int], Tensor]
) -> None:
    # a pseudo-Huber constant above all distances makes ECT a regression, whose minimiser is known
    s = 0.2
    shared = {"steps": 120, "batch": 64, "learning_rate": 4e-3, "warmup": 10, "decay": 0.5, "ema": [0.95]}
    config = tiny_config(
        edm={**shared, "P_mean": -1.0, "P_std": 1.0},
        ect={**shared, "P_mean": -0.8, "P_std": 1.0, "stages": 4, "huber_c": 10.0},
        network={"channel_mult": [1]},
    )
    images = s * np.random.default_rng(0).standard_normal((8192, 1, 4, 4)).astype(np.float32)
    train(config, ImageSet(images, None, 0, "gauss"), tmp_path)
    D, f = (read_checkpoint(tmp_path / name).model() for name in ("phase-0-edm.pt", "ckpt.pt"))
    generator = torch.Generator().manual_seed(0)
    for t in (0.1, 0.2, 0.5, 1.0):
        x = math.hypot(s, t) * torch.randn(2000, 1, 4, 4, generator=generator)
        with torch.no_grad():
            found_D, found_f = (model(x, torch.full((2000,), t)) for model in (D, f))

        def far(found: Tensor, slope: float, x: Tensor = x) -> float:
            """Root mean square error in units of the data's deviation."""
            return (found - slope * x).square().mean().sqrt().item() / s

        exact = s**2 / (s**2 + t**2)
        untrained = 0.25 / (0.25 + t**2)  # F starts as zero, which leaves c_skip x
        assert far(found_D, exact) < 0.3 * far(untrained * x, exact)
        fixed = ect_fixed_point(torch.tensor([t]), s, 3).item()
        assert far(found_f, fixed) < 0.15
        assert (found_f * x).sum().item() / x.square().sum().item() == pytest.approx(fixed, abs=0.04)
        assert abs(fixed - exact) > 0.07  # so a teacher would not pass for a student


# stopping and going on


def stop_at(phase: int, at: int, kind: signal.Signals = signal.SIGINT) -> Callable[[Report], None]:
    """A report that sends this process a signal at that step."""

    def report(where: Report) -> None:
        if (where.phase, where.step) == (phase, at):
            os.kill(os.getpid(), kind)

    return report


@pytest.mark.process
def test_a_run_stopped_at_every_step_ends_as_the_one_never_stopped(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    config = tiny_config(
        edm={"steps": 11, "ema": [0.5, 0.9], "decay": 0.5},
        ect={"warmup": 2},
        network={"dropout": 0.2, "channel_mult": [1]},
        data={"flip": True},
        weights="float16",
        sample_every=2,
    )
    train(config, toy_images, tmp_path / "whole")
    stops = [(0, at) for at in range(1, 12)] + [(1, 1), (1, 2)]
    for count, (phase, at) in enumerate(stops):
        with pytest.raises(Interrupted, match=f"phase {phase} step {at};.*--resume --out {tmp_path / 'stopped'}"):
            train(
                config, toy_images, tmp_path / "stopped", resume=count > 0, observer=Observer(step=stop_at(phase, at))
            )
        assert read_checkpoint(tmp_path / "stopped" / "ckpt.pt").training.steps == at + 11 * phase
    # asked to stop at its last step, a run is simply done
    train(config, toy_images, tmp_path / "stopped", resume=True, observer=Observer(step=stop_at(1, 3)))
    assert_same(left_behind(tmp_path / "stopped"), left_behind(tmp_path / "whole"))


def distilling(**top: Any) -> TrainConfig:
    """Every kind of phase that has an EMA target or a teacher, its teacher stored in float16."""
    shared = {"batch": 3, "learning_rate": 1e-2, "ema": [0.5]}
    phases = [
        {"method": "edm", "steps": 1, **shared},
        {"method": "cd", "steps": 3, "N": 4, "mu": 0.7, **shared},
        {"method": "ct", "steps": 3, "s1": 9, "mu0": 0.5, "micro_batch": 2, "optimizer": "adam", **shared},
    ]
    tree = {
        "data": {"source": "toy", "flip": True},
        "network": {**TINY_NETWORK, "channel_mult": [1], "dropout": 0.2},
        "phase": phases,
        "weights": "float16",
        **top,
    }
    return parse_config(tree, "distilling")


@pytest.mark.slow
@pytest.mark.process
def test_a_run_with_targets_and_a_teacher_stopped_at_every_step_ends_as_the_one_never_stopped(
    tmp_path: Path, toy_images: ImageSet
) -> None:
    config = distilling()
    train(config, toy_images, tmp_path / "whole")
    stops = [(0, 1), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    for count, (phase, at) in enumerate(stops):
        with pytest.raises(Interrupted, match=f"phase {phase} step {at};"):
            train(config, toy_images, tmp_path / "run", resume=count > 0, observer=Observer(step=stop_at(phase, at)))
        target, model = (pt(tmp_path / "run" / "state.pt")[key] for key in ("target", "model"))
        assert (target == {}) == (phase == 0)
        assert phase == 0 or not all(torch.equal(target[name], model[name]) for name in target)
    train(config, toy_images, tmp_path / "run", resume=True)
    assert_same(left_behind(tmp_path / "run"), left_behind(tmp_path / "whole"))
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["from_images"] for session in sessions] == [0, 3, 6, 9, 12, 15, 18]


@pytest.mark.process
def test_cds_teacher_is_the_file_of_the_phase_before(
    tmp_path: Path, toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[Any] = []
    loss_of = stepper.loss_of

    def remembering(phase: Any, sigma_data: float, teacher: Any, device: torch.device) -> Loss:
        teachers.append(teacher)
        return loss_of(phase, sigma_data, teacher, device)

    monkeypatch.setattr(stepper, "loss_of", remembering)
    train(distilling(), toy_images, tmp_path)
    assert teachers[0] is None and teachers[2] is None
    stored = pt(tmp_path / "phase-0-edm.pt")["ema"]["0.5"]
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in teachers[1].state_dict().items())
    assert not teachers[1].training and teachers[1].config.precond == "edm"


@pytest.mark.process
def test_a_gaussian_teacher_has_the_datas_deviation(
    tmp_path: Path, toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    gaussian = second_points.gaussian
    monkeypatch.setattr(second_points, "gaussian", lambda s: (asked.append(s), gaussian(s))[1])
    phase = {"method": "cd", "teacher": "gaussian", "steps": 1, "batch": 2, "learning_rate": 1e-3}
    train(distilling(phase=[phase]), toy_images, tmp_path)
    assert asked == [pytest.approx(np.sqrt(((toy_images.images / 127.5 - 1) ** 2).mean()))]


def ended(folder: Path, toy_images: ImageSet, **top: Any) -> str:
    """The checkpoint of a short run of edm."""
    phase = {"method": "edm", "steps": 1, "batch": 3, "learning_rate": 1e-2}
    return str(train(distilling(phase=[phase], **top), toy_images, folder))


@pytest.mark.process
@pytest.mark.parametrize("method", ["edm", "cd", "ct", "ict", "ect"])
def test_every_method_starts_from_the_checkpoint_given(
    tmp_path: Path, toy_images: ImageSet, seen: list[Seen], method: str
) -> None:
    first = ended(tmp_path / "first", toy_images)
    phase = {"method": method, "steps": 1, "batch": 3, "learning_rate": 1e-2}
    out = tmp_path / "second"
    train(distilling(init=first, phase=[phase], seed=3), toy_images, out)
    wanted = pt(Path(first))["ema"]["0.999"]
    assert all(torch.equal(seen[-1].weights[name], tensor.float()) for name, tensor in wanted.items())
    digest = hashlib.sha256(Path(first).read_bytes()).hexdigest()
    assert read_checkpoint(out / "ckpt.pt").training.config["init"] == digest
    assert json.loads((out / "run.json").read_text())[0]["inputs"]["init"] == digest


@pytest.mark.process
def test_a_run_goes_on_from_the_same_start_wherever_it_lies_and_from_no_other(
    tmp_path: Path, toy_images: ImageSet
) -> None:
    first, other = (ended(tmp_path / str(seed), toy_images, seed=seed) for seed in (0, 1))
    phase = {"method": "cd", "steps": 3, "batch": 3, "learning_rate": 1e-2, "mu": 0.5, "ema": [0.5]}

    def config(init: str | None) -> TrainConfig:
        return distilling(init=init, phase=[phase])

    train(config(first), toy_images, tmp_path / "whole")
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config(first), toy_images, out, observer=Observer(step=stop_at(0, 1)))
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(TrainingError, match="another init"):
        train(config(other), toy_images, out, resume=True)
    changed = ImageSet(toy_images.images.copy(), toy_images.labels, 3, "toy")
    changed.images[49, 0, 7, 7] ^= 1
    with pytest.raises(TrainingError, match="another data"):
        train(config(first), changed, out, resume=True)
    with pytest.raises(CheckpointError, match="nowhere"):
        train(config(str(tmp_path / "nowhere.pt")), toy_images, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    moved = tmp_path / "moved.pt"
    Path(first).rename(moved)
    train(config(str(moved)), toy_images, out, resume=True)
    found, whole = left_behind(out), left_behind(tmp_path / "whole")
    assert found["ckpt.pt"] == whole["ckpt.pt"]  # it knows its start by what that held


@pytest.mark.process
def test_a_start_of_another_network_is_refused_by_name(tmp_path: Path, toy_images: ImageSet) -> None:
    first = ended(tmp_path / "first", toy_images)
    phase = {"method": "ect", "steps": 1, "batch": 3, "learning_rate": 1e-2}
    config = distilling(init=first, phase=[phase], network={**TINY_NETWORK, "channel_mult": [1, 2], "dropout": 0.2})
    with pytest.raises(TrainingError, match=r"ckpt\.pt is of another network: channel_mult \(1,\), not \(1, 2\)"):
        train(config, toy_images, tmp_path / "second")


def curves(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


@pytest.mark.process
def test_tensorboard_has_the_logs_curves_and_the_grids_and_a_resumed_run_hides_what_was_lost(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    def killed(where: Report) -> None:
        if where.step == 12:
            raise Killed

    config = tiny_config(edm={"steps": 20, "batch": 1}, phases=1, save_every=7, network={"channel_mult": [1]})
    with pytest.raises(Killed):
        train(config, toy_images, tmp_path, observer=Observer(step=killed))
    time.sleep(0.01)
    train(config, toy_images, tmp_path, resume=True)
    found, lines = curves(tmp_path), log_of(tmp_path)
    assert set(found.Tags()["scalars"]) >= {"loss/edm", "learning_rate", "gradient_norm"}
    assert "loss" not in found.Tags()["scalars"]
    for name in ("loss", "learning_rate", "gradient_norm"):
        points = found.Scalars("loss/edm" if name == "loss" else name)
        assert [(point.step, pytest.approx(point.value)) for point in points] == [
            (line["images"], line[name]) for line in lines
        ]
    [picture] = found.Images("samples")
    assert picture.step == 20
    with (
        Image.open(io.BytesIO(picture.encoded_image_string)) as shown,
        Image.open(tmp_path / "samples" / "0-edm-000020.png") as saved,
    ):
        assert (np.asarray(shown.convert("L")) == np.asarray(saved.convert("L"))).all()
    train(config, toy_images, tmp_path, force=True)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.process
def test_without_tensorboard_there_is_no_folder_for_it(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    train(tiny_config(phases=1), toy_images, tmp_path)
    assert (tmp_path / "tensorboard").exists()
    train(tiny_config(phases=1, tensorboard=False), toy_images, tmp_path, force=True)
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.process
def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, tiny_config: Config, toy_images: ImageSet) -> None:
    train(tiny_config(), toy_images, tmp_path)
    before = left_behind(tmp_path)
    reports: list[Report] = []
    assert (
        train(tiny_config(), toy_images, tmp_path, resume=True, observer=Observer(step=reports.append))
        == tmp_path / "ckpt.pt"
    )
    assert reports == []
    assert_same(left_behind(tmp_path), before)


@pytest.mark.process
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_and_their_handlers_come_back(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, kind: signal.Signals
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted):
        train(tiny_config(), toy_images, tmp_path, observer=Observer(step=stop_at(0, 2, kind)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    train(tiny_config(), toy_images, tmp_path, resume=True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.process
def test_a_second_interrupt_does_not_wait(tmp_path: Path, tiny_config: Config, toy_images: ImageSet) -> None:
    def twice(where: Report) -> None:
        if where.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    config = tiny_config(save_every=1)
    train(config, toy_images, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, toy_images, tmp_path / "run", observer=Observer(step=twice))
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt").training.steps == 1
    train(config, toy_images, tmp_path / "run", resume=True)
    assert_same(left_behind(tmp_path / "run"), left_behind(tmp_path / "whole"))


class Killed(BaseException):
    """Stands for SIGKILL at one chosen moment, which no code of ours catches."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_at_any_write_ends_as_the_one_never_killed(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Every file appears through files.written: the kill comes just before or just after each such moment in turn."""
    shared = {"batch": 3, "learning_rate": 1e-2, "ema": [0.5]}
    methods = ({"method": "edm"}, {"method": "cd", "mu": 0.7}, {"method": "ect"})
    phases = [{"steps": 1, **method, **shared} for method in methods]
    config = distilling(save_every=1, sample_every=1, phase=phases)
    written = atomic.write
    writes: list[str] = []
    last = -1

    @contextmanager
    def counted(path: Path, *, force: bool = True) -> Iterator[Path]:
        writes.append(Path(path).name)
        killed = len(writes) - 1 == last
        with written(path, force=force) as temporary:
            yield temporary
            if killed and moment == "before":
                raise Killed
        if killed:
            raise Killed

    monkeypatch.setattr(atomic, "write", counted)
    train(config, toy_images, tmp_path / "whole")
    whole, names = left_behind(tmp_path / "whole"), list(writes)
    assert len(names) >= 1 + 3 * 3 + 2  # the config; checkpoint, state and grid of every step; two phases
    for kill, name in enumerate(names):
        out = tmp_path / f"{kill}"
        writes.clear()
        last = kill
        with pytest.raises(Killed):
            train(config, toy_images, out)
        last = -1
        if (out / "ckpt.pt").exists():
            read_checkpoint(out / "ckpt.pt")
        resume = (out / "state.pt").exists()
        train(config, toy_images, out, resume=resume, force=not resume)
        assert_same(left_behind(out), whole, f"killed {moment} {name} was written")


@contextmanager
def full_disk(at: int, room: int) -> Iterator[Callable[[Report], None]]:
    """A report after whose step ``at`` the kernel refuses to let any file grow beyond ``room`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def report(where: Report) -> None:
        if where.step == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    try:
        yield report
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.process
def test_a_run_whose_disk_fills_up_ends_in_one_line_and_goes_on_as_the_one_that_had_room(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    config = tiny_config(network={"channel_mult": [1]}, edm={"steps": 10}, save_every=2, sample_every=5, phases=1)
    train(config, toy_images, tmp_path / "whole")
    whole = left_behind(tmp_path / "whole")
    for named, at, fitting in (
        ("ckpt.pt", 4, None),
        ("state.pt", 4, "ckpt.pt"),
        ("0-edm-000005.png", 5, None),
        ("log.jsonl", 10, None),
        ("events.out.tfevents", 10, "log.jsonl"),
    ):
        out = tmp_path / named
        room = 0 if fitting is None else (tmp_path / "whole" / fitting).stat().st_size + 32  # a log's times differ
        with full_disk(at, room) as report, pytest.raises(OutputError) as caught:
            train(config, toy_images, out, observer=Observer(step=report))
        assert re.fullmatch(rf"{out}/(\w+/)?{named}\S* cannot be written: File too large", str(caught.value))
        saved = (at - 1) // 2 * 2
        assert read_checkpoint(out / "ckpt.pt").training.steps == saved + 2 * (named == "state.pt")
        assert pt(out / "state.pt")["step"] == saved
        train(config, toy_images, out, resume=True)
        assert_same(left_behind(out), whole, named)


@pytest.mark.process
def test_a_log_holds_every_step_once_though_a_run_was_killed(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    def killed(where: Report) -> None:
        if where.step == 12:
            raise Killed

    config = tiny_config(edm={"steps": 20, "batch": 1}, network={"channel_mult": [1]}, save_every=7, phases=1)
    with pytest.raises(Killed):
        train(config, toy_images, tmp_path, observer=Observer(step=killed))
    assert pt(tmp_path / "state.pt")["step"] == 7
    assert [line["step"] for line in log_of(tmp_path)] == [10]
    train(config, toy_images, tmp_path, resume=True)
    assert [line["step"] for line in log_of(tmp_path)] == [10, 20]


@pytest.mark.process
def test_moved_data_and_other_saving_may_be_given_when_a_run_goes_on(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    train(tiny_config(), toy_images, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tiny_config(), toy_images, tmp_path / "run", observer=Observer(step=stop_at(0, 2)))
    moved = tiny_config(data={"source": "/moved"}, save_every=1, device="cpu")
    train(moved, toy_images, tmp_path / "run", resume=True)
    found, whole = left_behind(tmp_path / "run"), left_behind(tmp_path / "whole")
    for name in ("ckpt.pt", "phase-0-edm.pt"):
        assert found[name]["ema"] == whole[name]["ema"]


@pytest.mark.process
@pytest.mark.parametrize("changed", ["size", "classes", "channels"])
def test_a_run_does_not_go_on_with_other_images(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, changed: str
) -> None:
    with pytest.raises(Interrupted):
        train(
            tiny_config(network={"patch": 2, "channel_mult": [1]}),
            toy_images,
            tmp_path,
            observer=Observer(step=stop_at(0, 2)),
        )
    assert toy_images.labels is not None
    other = {
        "size": lambda: ImageSet(np.zeros((50, 1, 4, 4), np.uint8), toy_images.labels, 3, "small"),
        "classes": lambda: ImageSet(toy_images.images, toy_images.labels, 7, "more classes"),
        "channels": lambda: ImageSet(np.repeat(toy_images.images, 3, 1), toy_images.labels, 3, "coloured"),
    }[changed]()
    with pytest.raises(CmRuntimeError) as caught:
        train(tiny_config(network={"patch": 2, "channel_mult": [1]}), other, tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    train(tiny_config(network={"patch": 2, "channel_mult": [1]}), toy_images, tmp_path, resume=True)


@pytest.mark.process
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    refusals = []

    def second(where: Report) -> None:
        for how in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(OutputError, match="another run"):
                train(tiny_config(), toy_images, tmp_path / "run", **how)
            refusals.append(where.step)

    train(tiny_config(), toy_images, tmp_path / "run", observer=Observer(step=second))
    assert len(refusals) == 18
    assert read_checkpoint(tmp_path / "run" / "ckpt.pt").training.steps == 6


# failing


def spoil_loss(monkeypatch: pytest.MonkeyPatch, at: int, spoil: Callable[[Tensor], Tensor]) -> None:
    """From the call ``at`` on (from 0, over all phases), losses are ``spoil`` of what they were."""
    loss_of, calls = stepper.loss_of, iter(range(1000))

    def spoilt(*parts: Any) -> Loss:
        loss = loss_of(*parts)
        return lambda *inputs: spoil(loss(*inputs)) if next(calls) >= at else loss(*inputs)

    monkeypatch.setattr(stepper, "loss_of", spoilt)


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize(
    "spoil",
    [lambda loss: loss * float("nan"), lambda loss: loss * float("inf"), lambda loss: (loss - loss.detach()).sqrt()],
    ids=["NaN", "infinity", "only the gradient"],
)
@pytest.mark.parametrize(("call", "phase", "at", "saved"), [(5, 0, 5, 4), (9, 1, 2, 2), (10, 1, 3, 2)])
def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_checkpoint_stays_good(
    tmp_path: Path,
    tiny_config: Config,
    toy_images: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Tensor], Tensor],
    call: int,
    phase: int,
    at: int,
    saved: int,
) -> None:
    config = tiny_config(edm={"steps": 7}, ect={"steps": 5}, network={"channel_mult": [1]}, save_every=2)
    with monkeypatch.context() as patch:
        spoil_loss(patch, call, spoil)
        with pytest.raises(TrainingError) as caught:
            train(config, toy_images, tmp_path / "run")
    line = str(caught.value)
    assert "\n" not in line and "not finite" in line and str(tmp_path / "run") in line
    assert f"phase {phase} step {at};" in line and f"of step {saved} " in line
    found = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert found.training.steps == saved + 7 * phase
    assert all(weight.isfinite().all() for weight in found.model().parameters())
    # and the run goes on from there once the cause is gone
    train(config, toy_images, tmp_path / "run", resume=True)
    train(config, toy_images, tmp_path / "whole")
    assert_same(left_behind(tmp_path / "run"), left_behind(tmp_path / "whole"))


def test_where_nothing_was_saved_yet_no_checkpoint_is_promised(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, 1, lambda loss: loss * float("nan"))
    with pytest.raises(TrainingError, match="step 1") as caught:
        train(tiny_config(), toy_images, tmp_path)
    assert not (tmp_path / "ckpt.pt").exists()
    assert "last good checkpoint is of" not in str(caught.value)


@pytest.mark.process
@pytest.mark.parametrize("weights", ["float32", "float16"])
@pytest.mark.parametrize("learning_rate", [1e4, 1e9, 1e38])
def test_a_run_that_diverges_never_writes_a_checkpoint_that_does_not_load(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, weights: str, learning_rate: float
) -> None:
    config = tiny_config(
        edm={"steps": 6, "learning_rate": learning_rate}, save_every=1, sample_every=9, weights=weights, phases=1
    )

    def readable(_: Report) -> None:
        if (tmp_path / "ckpt.pt").exists():
            read_checkpoint(tmp_path / "ckpt.pt")

    with pytest.raises(TrainingError):
        train(config, toy_images, tmp_path, observer=Observer(step=readable))
    if (tmp_path / "ckpt.pt").exists():
        read_checkpoint(tmp_path / "ckpt.pt").model()


def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")

    spoil_loss(monkeypatch, 2, full)
    with pytest.raises(CmRuntimeError, match="batch") as caught:
        train(tiny_config(), toy_images, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "batch", "key"),
    [
        ({"channels": 4096, "channel_mult": [16, 16], "res_blocks": 16}, 4, "network.channels"),
        ({"channels": 1024, "res_blocks": 16}, 1 << 16, "phase.0.micro_batch"),
    ],
)
def test_a_run_larger_than_the_machine_is_refused_before_it_takes_memory(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, network: dict[str, Any], batch: int, key: str
) -> None:
    config = tiny_config(network=network, edm={"batch": batch}, ect={"batch": batch}, device="cpu")
    with pytest.raises(TrainingError, match=rf"phase 0 takes at least \d+ GB .* lower .*{key}"):
        train(config, toy_images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_must_be_square(tmp_path: Path, tiny_config: Config) -> None:
    data = ImageSet(np.zeros((4, 3, 8, 6), np.uint8), None, 0, "wide")
    with pytest.raises(TrainingError, match=r"square, not 8x6.*image_size"):
        train(tiny_config(), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"channel_mult": [1, 1, 1, 1, 1]}, "8 must be a multiple of 16"),
        ({"attention": [3]}, r"attention at \[3\].*\[8, 4\]"),
        ({"head_channels": 48}, "64 channels do not split into heads of 48"),
        ({"channel_mult": [1, 65]}, "from 1 to 64"),
    ],
)
def test_a_network_that_does_not_fit_the_images_says_why(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet, network: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainingError, match=words) as caught:
        train(tiny_config(network=network), toy_images, tmp_path / "run")
    line = str(caught.value)
    assert "\n" not in line and "toy" in line and "pydantic" not in line and "type=" not in line
    assert "Value error" not in line
    assert not (tmp_path / "run").exists()


def test_the_model_is_what_config_and_images_make_it(tiny_config: Config, toy_images: ImageSet) -> None:
    config = tiny_config(network={"patch": 2, "dropout": 0.1}, precond="piecewise", sigma_data=0.3)
    made = model_config_of(config, toy_images)
    assert made.network.model_dump() == {
        **config.network.model_dump(),
        "image_size": 8,
        "image_channels": 1,
        "num_classes": 3,
    }
    assert (made.precond, made.sigma_data, made.sigma_boundary) == ("piecewise", 0.3, 0.002)
    assert (made.sigma_min, made.sigma_max, made.rho) == (0.002, 80.0, 7.0)
    assert model_config_of(tiny_config(data={"classes": False}), toy_images).network.num_classes == 0


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x", "meta", ""])
def test_a_device_that_cannot_train_is_refused_by_name(name: str) -> None:
    with pytest.raises(EngineError) as caught:
        find_device(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_devices_that_can() -> None:
    assert find_device("cpu").type == "cpu"
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.process
def test_a_run_that_exists_is_refused_and_force_starts_it_over(
    tmp_path: Path, tiny_config: Config, toy_images: ImageSet
) -> None:
    train(tiny_config(seed=1), toy_images, tmp_path)
    before = left_behind(tmp_path)
    with pytest.raises(OutputError, match="--force"):
        train(tiny_config(seed=1), toy_images, tmp_path)
    with pytest.raises(TrainingError, match="another seed"):
        train(tiny_config(seed=2), toy_images, tmp_path, resume=True)
    assert_same(left_behind(tmp_path), before)
    train(tiny_config(seed=2), toy_images, tmp_path, force=True)
    assert left_behind(tmp_path)["ckpt.pt"]["ema"] != before["ckpt.pt"]["ema"]
    train(tiny_config(seed=1), toy_images, tmp_path, force=True)
    assert_same(left_behind(tmp_path), before)


@pytest.mark.process
def test_a_run_owns_its_folder_only_while_it_trains(tmp_path: Path, tiny_config: Config, toy_images: ImageSet) -> None:
    train(tiny_config(), toy_images, tmp_path)
    inputs = {"data": provenance.fingerprint(toy_images), "init": ""}
    with RunFolder(tmp_path).open(tiny_config(), inputs, resume=True, force=False) as state:
        assert state is not None and (state["phase"], state["step"], state["images"]) == (1, 3, 24)
