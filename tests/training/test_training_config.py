"""The configuration of a run: what it refuses, what --set does, and that every key reaches the training."""

from __future__ import annotations

import hashlib
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel, ValidationError

from cm_runtime import cli, sampling
from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.errors import CmRuntimeError, ConfigError
from cm_runtime.training import loop, lpips
from cm_runtime.training.config import (
    PRESETS,
    CdPhase,
    ConsistencyPhase,
    CtPhase,
    EctPhase,
    EdmPhase,
    IctPhase,
    Phase,
    TrainConfig,
    load_config,
    parse_config,
    preset_names,
)
from cm_runtime.training.distances import Distance
from cm_runtime.training.run_folder import RunFolder
from cm_runtime.training.stepper import Stepper

BASE = """
[data]
source = "SOURCE"

[network]
channels = 32
channel_mult = [1, 2]
res_blocks = 1
head_channels = 32

[[phase]]
method = "edm"
steps = 3
batch = 4
learning_rate = 1e-3
ema = [0.5]

[[phase]]
method = "ect"
steps = 3
batch = 4
learning_rate = 1e-3
ema = [0.5]
"""


def place(folder: Path) -> Path:
    """A TOML file of both phases in ``folder``, beside two folders of 8x8 pictures in two classes."""
    rng = np.random.default_rng(0)
    for name in ("pictures", "others"):
        for label in "ab":
            (folder / name / label).mkdir(parents=True)
            for i in range(5):
                picture = Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8))
                picture.save(folder / name / label / f"{i}.png")
    path = folder / "base.toml"
    path.write_text(BASE.replace("SOURCE", str(folder / "pictures")))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return place(tmp_path)


def refused(path: Path, *settings: str) -> str:
    """The one line with which load_config refuses."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, settings)
    line = str(caught.value)
    assert "\n" not in line
    return line


# every key arrives


WALK = """
[data]
source = "SOURCE"

[network]
channels = 32
channel_mult = [1, 2]
res_blocks = 1
head_channels = 32

[[phase]]
method = "METHOD"
steps = 3
batch = 4
learning_rate = 1e-3
ema = [0.5]
"""
METHODS: dict[str, type[BaseModel]] = {
    "edm": EdmPhase,
    "cd": CdPhase,
    "ct": CtPhase,
    "ict": IctPhase,
    "ect": EctPhase,
}
STARTED = ("cd", "ect")  # these go on from a checkpoint, where the others begin afresh

# Keys of the whole run, changed in a run of ict; OTHERS is the second folder of pictures, START a checkpoint
RUN = {
    "data.source": "OTHERS",
    "data.image_size": "4",
    "data.classes": "false",
    "data.flip": "true",
    "network.channels": "64",
    "network.channel_mult": "[1, 1]",
    "network.res_blocks": "2",
    "network.attention": "[4]",
    "network.head_channels": "64",
    "network.scale_shift": "false",
    "network.resample": "resblock",
    "network.dropout": "0.5",
    "network.patch": "2",
    "network.middle_attention": "false",
    "network.norm_groups": "8",
    "network.norm_eps": "0.1",
    "init": "START",
    "precond": "boundary",
    "sigma_data": "0.7",
    "seed": "1",
    "channels_last": "true",
    "compile": "true",
    "save_every": "1",
    "sample_every": "1",
    "tensorboard": "false",
    "weights": "float16",
}
EVERY_PHASE = {
    "steps": "4",
    "batch": "5",
    "micro_batch": "1",
    "optimizer": "adam",
    "betas": "[0.5, 0.9]",
    "learning_rate": "2e-3",
    "warmup": "2",
    "decay": "1.0",
    "clip": "1e-3",
    "ema": "[0.05]",
    "precision": "bf16",
}
CONSISTENCY = {"distance": "l1", "huber_c": "0.5", "lpips": "['b']"}
PHASE = {
    "edm": {**EVERY_PHASE, "method": "ict", "P_mean": "0.5", "P_std": "0.5"},
    "cd": {
        **EVERY_PHASE,
        **CONSISTENCY,
        "method": "ct",
        "weighting": "gap",
        "N": "9",
        "solver": "euler",
        "teacher": "gaussian",
        "mu": "0.0",
    },
    "ct": {**EVERY_PHASE, **CONSISTENCY, "method": "ict", "weighting": "gap", "s0": "3", "s1": "9", "mu0": "0.2"},
    "ict": {
        **EVERY_PHASE,
        **CONSISTENCY,
        "method": "edm",
        "weighting": "one",
        "s0": "3",
        "s1": "15",
        "P_mean": "0.5",
        "P_std": "0.5",
    },
    "ect": {
        **EVERY_PHASE,
        **CONSISTENCY,
        "method": "edm",
        "weighting": "one",
        "P_mean": "0.5",
        "P_std": "0.5",
        "q": "3.0",
        "k": "2.0",
        "b": "3.0",
        "first_stage": "2",
        "stages": "2",
    },
}
# What only others' checkpoints need to be told; tests/training/test_imported_start.py changes these
IMPORTED = {"init_precond", "init_head_channels", "init_image_size"}
# (method of the run, key, value)
CHANGES = [("ict", key, value) for key, value in RUN.items()] + [
    (method, f"phase.0.{key}", value) for method, keys in PHASE.items() for key, value in keys.items()
]
# Of the methods that have a key one is quick, each in its turn
HAVE = {key: [method for method in PHASE if key in PHASE[method]] for keys in PHASE.values() for key in keys}
QUICK = {(methods[n % len(methods)], f"phase.0.{key}") for n, (key, methods) in enumerate(HAVE.items())}
CASES = [pytest.param(*case, marks=() if case[1] in RUN or case[:2] in QUICK else pytest.mark.slow) for case in CHANGES]
# What must be there, changed or not, for a key to have a meaning
BESIDE = {
    "phase.0.huber_c": ["phase.0.distance=huber"],
    "phase.0.lpips": ["phase.0.distance=lpips", "phase.0.lpips=['a']"],
}
# Keys that change something else than the weights
WHAT = {
    "phase.0.micro_batch": "passes",
    "channels_last": "layout",
    "compile": "compiled",
    "save_every": "saves",
    "sample_every": "grids",
    "tensorboard": "boards",
}


def keys_of(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key under ``model`` but those of phases."""
    found = set()
    for name, field in model.model_fields.items():
        tables = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        tables = [kind for kind in tables if issubclass(kind, BaseModel)]
        if tables and name != "phase":
            found |= keys_of(tables[0], f"{prefix}{name}.")
        elif name != "phase":
            found.add(prefix + name)
    return found


def train_in_process(*words: str) -> int:
    """The exit status of ``cm-runtime train``."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words])
    return int(ended.value.code or 0)


Trained = Callable[[str, Sequence[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """(method, settings) -> what that run leaves behind, apart from the configuration that it writes down itself."""
    folder = tmp_path_factory.mktemp("walk")
    place(folder)
    start = folder / "start.pt"
    seen: dict[str, list[Any]] = {"saves": [], "layout": [], "compiled": [], "passes": []}
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    save, heun, backward, threads = RunFolder.save, sampling.heun, Stepper._backward, torch.get_num_threads()
    torch.set_num_threads(1)

    def saving(self: RunFolder, state: dict[str, Any], checkpoint: Checkpoint) -> None:
        seen["saves"].append(state["step"])
        seen["layout"].append([t.stride() for t in state["model"].values() if t.dim() == 4])
        save(self, state, checkpoint)

    def passing(self: Stepper, *where: Any) -> float:
        seen["passes"].append(where[-1])
        return backward(self, *where)

    def stand_in(paths: list[Path], device: torch.device) -> Distance:
        return lambda a, b: (a - b).abs().sum((1, 2, 3)) * len(paths) * (1 if paths[0].name == "a" else 2)

    def run(method: str, settings: Sequence[str]) -> dict[str, Any]:
        if (method, *settings) in known:
            return known[method, *settings]
        for list_ in seen.values():
            list_.clear()
        (folder / "walk.toml").write_text(WALK.replace("SOURCE", str(folder / "pictures")).replace("METHOD", method))
        begun = [f"init={start}"] * (method in STARTED)
        names = {"OTHERS": str(folder / "others"), "START": str(start)}
        told = [names.get(text.partition("=")[2], "") for text in settings]
        words = [
            f"{text.partition('=')[0]}={name}" if name else text for text, name in zip(settings, told, strict=True)
        ]
        words = [word for setting in [*begun, *words] for word in ("--set", setting)]
        out = folder / "run"
        assert train_in_process(str(folder / "walk.toml"), "--out", str(out), "--force", *words) == 0
        weights = hashlib.sha256()
        for state in torch.load(out / "ckpt.pt", weights_only=True)["ema"].values():
            for key, tensor in state.items():
                weights.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                weights.update(tensor.numpy().tobytes())
        grids = sorted(path.name for path in (out / "samples").iterdir())
        boards = (out / "tensorboard").exists()
        found = {name: list(list_) for name, list_ in seen.items()}
        known[method, *settings] = {**found, "weights": weights.hexdigest(), "grids": grids, "boards": boards}
        return known[method, *settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", saving)
        patch.setattr(Stepper, "_backward", passing)
        patch.setattr(torch.nn.Module, "compile", lambda self: seen["compiled"].append(type(self).__name__))
        patch.setattr(lpips, "load_lpips", stand_in)
        patch.setattr(loop, "GRID_IMAGES", 4)
        patch.setattr(sampling, "heun", lambda denoiser, x, label: heun(denoiser, x, label, steps=2))
        run("edm", ["seed=9"])
        shutil.copyfile(folder / "run" / "ckpt.pt", start)
        yield run
    torch.set_num_threads(threads)


@pytest.mark.process
@pytest.mark.parametrize("method", METHODS)
def test_the_same_configuration_gives_the_same_run(trained: Trained, method: str) -> None:
    assert trained(method, ["seed=0"]) == trained(method, [])  # 0 is the default, and both are run


@pytest.mark.process
@pytest.mark.parametrize(("method", "key", "value"), CASES)
def test_every_key_changes_what_a_run_leaves_behind(trained: Trained, method: str, key: str, value: str) -> None:
    beside = BESIDE.get(key, [])
    before, after = trained(method, beside), trained(method, [*beside, f"{key}={value}"])
    what = WHAT.get(key, "weights")
    assert after[what] != before[what]
    if what in ("saves", "grids", "boards", "compiled"):
        assert after["weights"] == before["weights"]


def test_no_key_is_left_out_above() -> None:
    assert set(RUN) | IMPORTED | {"device"} == keys_of(TrainConfig)
    assert {method: set(keys) for method, keys in PHASE.items()} == {
        method: keys_of(phase) for method, phase in METHODS.items()
    }
    assert set(METHODS.values()) == set(get_args(Phase)) | set(get_args(ConsistencyPhase)) - {ConsistencyPhase}


@pytest.mark.process
@pytest.mark.parametrize("method", ["edm", "cd", "ict", "ect"])
def test_every_phase_computes_in_float64_when_asked(trained: Trained, method: str) -> None:
    assert trained(method, ["phase.0.precision=fp64"])["weights"] != trained(method, [])["weights"]


@pytest.mark.process
@pytest.mark.parametrize(("method", "networks"), [("cd", 3), ("ct", 2), ("ict", 1), ("ect", 1), ("edm", 1)])
def test_student_target_and_teacher_are_each_compiled_once(trained: Trained, method: str, networks: int) -> None:
    """A real compilation takes minutes, so that only the calls are counted."""
    assert trained(method, ["compile=true"])["compiled"] == ["ConsistencyModel"] * networks
    assert trained(method, [])["compiled"] == []


# keys whose other values cannot run here, and the words of the refusal
REFUSED = {
    "device": (["device=cuda:99"], "cuda:99"),
    "phase.0.method": (["phase.0.method=ect"], "denoiser"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_keys_whose_other_values_cannot_run_here_are_refused_by_name(
    key: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, word = REFUSED[key]
    words = [word for setting in settings for word in ("--set", setting)]
    assert train_in_process(str(base), "--out", str(tmp_path / "run"), *words) == 1
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# what is refused


@pytest.mark.parametrize(
    "key", ["epochs", "data.path", "network.depth", "phase.0.lr", "phase.1.c", "phase.0.huber_c", "data.classes_"]
)
def test_unknown_keys_are_refused_by_name(base: Path, key: str) -> None:
    line = refused(base, f"{key}=1")
    assert f"{key}: unknown key" in line and base.name in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "-1"),
        ("seed", str(1 << 63)),
        ("seed", "'one'"),
        ("precond", "'vp'"),
        ("weights", "'int8'"),
        ("sigma_data", "0"),
        ("save_every", "0"),
        ("sample_every", "0"),
        ("device", "3"),
        ("data", "3"),
        ("data.source", "3"),
        ("data.flip", "3"),
        ("data.classes", "'perhaps'"),
        ("data.image_size", "0"),
        ("network", "[]"),
        ("network.channels", "0"),
        ("network.channels", "1e9"),
        ("network.channel_mult", "[]"),
        ("network.res_blocks", "'two'"),
        ("network.dropout", "1"),
        ("network.patch", "3"),
        ("network.resample", "'nearest'"),
        ("phase", "[]"),
        ("phase", "{}"),
        ("phase.0", "3"),
        ("phase.0.steps", "0"),
        ("phase.0.steps", "2.5"),
        ("phase.0.batch", "-4"),
        ("phase.0.learning_rate", "0"),
        ("phase.0.learning_rate", "'fast'"),
        ("phase.0.learning_rate", "nan"),
        ("phase.0.warmup", "-1"),
        ("phase.0.decay", "1.1"),
        ("phase.0.clip", "0"),
        ("phase.0.precision", "'fp8'"),
        ("phase.0.P_std", "0"),
        ("phase.1.q", "1"),
        ("phase.1.stages", "0"),
        ("phase.1.huber_c", "-1"),
    ],
)
def test_values_of_the_wrong_type_or_range_are_refused_by_name(base: Path, key: str, value: str) -> None:
    assert f"{base}: {key}: " in refused(base, f"{key}={value}")


@pytest.mark.parametrize("value", ["[]", "[1.0]", "[-0.1]", "0.9", "['high']"])
def test_averaging_rates_out_of_range_are_refused(base: Path, value: str) -> None:
    assert "phase.1.ema" in refused(base, f"phase.1.ema={value}")


@pytest.mark.parametrize("key", ["phase.0.P_mean", "phase.1.b", "sigma_data", "phase.0.learning_rate", "phase.1.P_std"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_that_are_not_finite_are_refused_by_name(base: Path, key: str, value: str) -> None:
    assert f"{key}: " in refused(base, f"{key}={value}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", "'sgd'"),
        ("betas", "[0.9]"),
        ("betas", "[0.9, 1.0]"),
        ("micro_batch", "0"),
        ("distance", "'l3'"),
        ("huber_c", "0"),
        ("weighting", "2"),
        ("lpips", "3"),
    ],
)
@pytest.mark.parametrize("method", ["cd", "ct", "ict", "ect"])
def test_wrong_values_of_consistency_phases_are_refused_by_name(base: Path, method: str, key: str, value: str) -> None:
    assert f"phase.1.{key}" in refused(base, f"phase.1.method={method}", f"phase.1.{key}={value}")


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("cd", ["N=1"], "phase.1.N"),
        ("cd", ["mu=1.0"], "phase.1.mu"),
        ("cd", ["mu=-0.1"], "phase.1.mu"),
        ("cd", ["solver=rk4"], "phase.1.solver"),
        ("cd", ["teacher=oracle"], "phase.1.teacher"),
        ("ct", ["s0=1"], "phase.1.s0"),
        ("ct", ["mu0=1"], "phase.1.mu0"),
        ("ct", ["s0=200"], "s1 150 must be at least s0 200"),
        ("ict", ["s0=10", "s1=9"], "s1 9 must be at least s0 10"),
        ("ict", ["s0=0"], "phase.1.s0"),
        ("ict", ["P_std=0"], "phase.1.P_std"),
        ("ect", ["first_stage=-1"], "phase.1.first_stage"),
        ("ect", ["first_stage=20"], "stages"),
        ("ect", ["N=18"], "phase.1.N: unknown key"),
        ("ict", ["mu=0.5"], "phase.1.mu: unknown key"),
        ("ct", ["teacher=before"], "phase.1.teacher: unknown key"),
        ("cd", ["huber_c=0.1"], "huber_c belongs to distance huber, not l2"),
        ("ect", ["distance=l1", "huber_c=0.1"], "huber_c belongs to distance huber, not l1"),
        ("ict", ["distance=lpips"], "distance lpips needs the key lpips"),
        ("ct", ["lpips=['vgg.pt']"], "no other takes it"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_name(
    base: Path, method: str, settings: list[str], words: str
) -> None:
    assert words in refused(base, f"phase.1.method={method}", *(f"phase.1.{setting}" for setting in settings))


@pytest.mark.parametrize("method", ["cd", "ect"])
def test_cd_and_ect_come_first_only_with_something_to_start_from(base: Path, method: str) -> None:
    tree = tomllib.loads(base.read_text())
    tree["phase"] = [{**tree["phase"][0], "method": method}]
    with pytest.raises(ConfigError, match=f"a {method} phase starts from a trained denoiser: give init"):
        parse_config(tree, "base")
    assert parse_config({**tree, "init": "teacher.pt"}, "base").phase[0].method == method


def test_a_run_without_an_init_needs_a_network_and_tells_nothing_of_an_init(base: Path) -> None:
    tree = tomllib.loads(base.read_text())
    with pytest.raises(ConfigError, match="give a network, or an init whose network it is"):
        parse_config({key: value for key, value in tree.items() if key != "network"}, "base")
    for key, value in (("init_precond", "edm"), ("init_head_channels", 8), ("init_image_size", 8)):
        with pytest.raises(ConfigError, match=f"{key} tells of an init, and there is none"):
            parse_config({**tree, key: value}, "base")


@pytest.mark.parametrize("method", ["ct", "ict"])
def test_consistency_training_needs_nothing_before_it(base: Path, method: str) -> None:
    tree = tomllib.loads(base.read_text())
    tree["phase"] = [{**tree["phase"][0], "method": method}]
    assert parse_config(tree, "base").phase[0].method == method


def test_cd_of_the_gaussian_teacher_needs_nothing_before_it(base: Path) -> None:
    tree = tomllib.loads(base.read_text())
    tree["phase"] = [{**tree["phase"][0], "method": "cd", "teacher": "gaussian"}]
    parse_config(tree, "base")


def test_so_many_stages_that_r_rounds_to_t_are_refused(base: Path) -> None:
    # 1 / (t - r) would be 1 / 0 in float32
    assert "stages" in refused(base, "phase.1.stages=64")


@pytest.mark.parametrize("method", ["scd", "", "EDM"])
def test_an_unknown_method_is_refused_and_the_known_ones_are_named(base: Path, method: str) -> None:
    line = refused(base, f"phase.0.method='{method}'")
    assert "phase.0" in line and all(f"'{known}'" in line for known in METHODS)


def test_a_phase_without_method_is_refused(base: Path) -> None:
    assert "phase.0" in refused(base, "phase.0={steps = 1, batch = 1, learning_rate = 1.0}")


@pytest.mark.parametrize("key", ["data", "phase"])
def test_what_has_no_default_must_be_given(base: Path, key: str) -> None:
    tree = tomllib.loads(base.read_text())
    del tree[key]
    with pytest.raises(ConfigError, match=f"base: {key}: "):
        parse_config(tree, "base")


def test_ect_cannot_come_first(base: Path) -> None:
    tree = tomllib.loads(base.read_text())
    tree["phase"] = tree["phase"][1:]
    with pytest.raises(ConfigError, match="denoiser"):
        parse_config(tree, "base")
    tree["phase"] = [*tomllib.loads(base.read_text())["phase"], tree["phase"][0]]
    assert [phase.method for phase in parse_config(tree, "base").phase] == ["edm", "ect", "ect"]


def test_a_config_cannot_be_changed_afterwards(base: Path) -> None:
    config = load_config(base)
    for frozen, key in (
        (config, "seed"),
        (config.data, "flip"),
        (config.network, "channels"),
        (config.phase[0], "steps"),
    ):
        with pytest.raises(ValidationError):
            setattr(frozen, key, 1)


# --set


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("seed=7", lambda c: c.seed == 7),
        ("seed = 7".replace(" ", ""), lambda c: c.seed == 7),
        ("precond=boundary", lambda c: c.precond == "boundary"),
        ('precond="boundary"', lambda c: c.precond == "boundary"),
        ("data.source=/a/b=c.npz", lambda c: c.data.source == "/a/b=c.npz"),
        ("data.flip=true", lambda c: c.data.flip is True),
        ("network.attention=[4, 8]", lambda c: c.network.attention == (8, 4)),
        ("phase.0.steps=10", lambda c: (c.phase[0].steps, c.phase[1].steps) == (10, 3)),
        ("phase.1.steps=10", lambda c: (c.phase[0].steps, c.phase[1].steps) == (3, 10)),
        ("phase.1.ema=[0.9, 0.99]", lambda c: c.phase[1].ema == (0.9, 0.99)),
        ("phase.1.ema.0=0.25", lambda c: c.phase[1].ema == (0.25,)),
        ("network.channel_mult.1=3", lambda c: c.network.channel_mult == (1, 3)),
        ("phase.0.learning_rate=1e-5", lambda c: c.phase[0].learning_rate == 1e-5),
    ],
)
def test_set_changes_one_key(base: Path, setting: str, read: Callable[[TrainConfig], bool]) -> None:
    before = base.read_text()
    assert not read(load_config(base))
    assert read(load_config(base, [setting]))
    assert base.read_text() == before


def test_later_settings_win_and_tables_can_be_made(base: Path) -> None:
    assert load_config(base, ["seed=1", "seed=2"]).seed == 2
    tree = tomllib.loads(base.read_text())
    del tree["data"]
    base.write_text(
        "\n".join(line for line in base.read_text().splitlines() if "source" not in line and line != "[data]")
    )
    assert load_config(base, ["data.source=x", "data.flip=true"]).data.flip is True


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("garbage", "--set takes key=value, not 'garbage'"),
        ("", "--set takes key=value, not ''"),
        ("=3", "--set takes key=value, not '=3'"),
        ("phase.2.steps=1", "phase.2.steps"),
        ("phase.x.steps=1", "phase.x.steps"),
        ("phase.0.ema.3=0.5", "phase.0.ema.3"),
        ("data.source.deep=1", "data.source.deep"),
        ("data.source.deep.er=1", "data.source.deep.er"),
        ("seed.0=1", "seed"),
        ("x=1" + "0" * 5000, "base.toml: x: "),
        (
            "phase.1.first_stage=1" + "0" * 400,
            "base.toml: phase.1.first_stage: must be a whole number of at most 64 bits",
        ),
        (".".join(["a"] * 20_000) + "=1", "at most 16 parts"),
        ("phase=3", "phase"),
        ("phase..steps=1", "phase..steps"),
        (".=1", "unknown key"),
        ("seed=", "seed"),
        ("data={", "data"),
    ],
)
def test_settings_that_lead_nowhere_are_refused_by_name(base: Path, setting: str, named: str) -> None:
    assert named in refused(base, setting)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("edm", "data.image_size", "4097"),
        ("edm", "sigma_data", "1e300"),
        ("edm", "sigma_data", "1e-300"),
        ("edm", "save_every", "2_000_000_000"),
        ("edm", "phase.1.steps", "2_000_000_000"),
        ("edm", "phase.1.batch", "1_000_000_000"),
        ("edm", "phase.1.micro_batch", "1_000_000_000"),
        ("edm", "phase.1.learning_rate", "1e300"),
        ("edm", "phase.1.warmup", "9_000_000_000"),
        ("edm", "phase.1.P_mean", "-1e300"),
        ("edm", "phase.1.P_std", "1e300"),
        ("edm", "phase.1.ema", str([n / 64 for n in range(33)])),
        ("cd", "phase.1.N", "1_000_000_000"),
        ("ct", "phase.1.s1", "1_000_000_000"),
        ("ict", "phase.1.s1", "1_000_000_000"),
        ("ict", "phase.1.s0", "1_000_000_000"),
        ("ect", "phase.1.stages", "1_000_000_000"),
        ("ect", "phase.1.first_stage", "1_000_000_000"),
        ("ect", "phase.1.k", "1e300"),
        ("ect", "phase.1.huber_c", "1e300"),
    ],
)
def test_sizes_that_no_run_has_are_refused_by_name(base: Path, method: str, key: str, value: str) -> None:
    settings = [f"phase.1.method={method}", "phase.1.distance=huber"][: 1 + (key == "phase.1.huber_c")]
    line = refused(base, *settings, f"{key}={value}")
    assert f"{base}: {key}: " in line and (" should be " in line or "at most 32 items" in line)


def test_whole_numbers_beyond_float_are_refused_where_no_toml_was(base: Path) -> None:
    """A state's configuration is no TOML, and its numbers may have any size."""
    tree = tomllib.loads(base.read_text())
    tree["phase"][1]["stages"] = 10**400
    with pytest.raises(ConfigError, match=r"phase\.1\.stages"):
        parse_config(tree, "state.pt")


# files and presets


def test_a_file_that_is_not_there_is_answered_with_the_presets(tmp_path: Path) -> None:
    for name in ("fashion-minst", tmp_path / "none.toml"):
        with pytest.raises(ConfigError, match="fashion-mnist"):
            load_config(name)


@pytest.mark.parametrize("content", [b"[data", b"a = 1\na = 2", b"\xff\xfe", b"= 3", b"seed = 01"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert "bad.toml" in refused(path)


def test_a_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(tmp_path)
    (tmp_path / "empty.toml").touch()
    assert "empty.toml: data: " in refused(tmp_path / "empty.toml")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "x" * 300, "a\0b"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert name.replace("\0", " ")[:99] in refused(tmp_path / name)


def test_a_file_of_endless_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("a = " + "[" * 100_000)
    assert "deep.toml" in refused(path)


def test_every_preset_is_listed_and_read_by_name_and_path_alike() -> None:
    assert {f"{name}.toml" for name in preset_names()} == {path.name for path in PRESETS.iterdir()}
    for name in preset_names():
        assert load_config(PRESETS / f"{name}.toml") == load_config(name)


def test_config_errors_are_ours() -> None:
    assert issubclass(ConfigError, CmRuntimeError)


def test_ema_rates_of_one_name_are_refused() -> None:
    rates = "phase.0.ema=[0.9999991, 0.9999992]"
    with pytest.raises(ConfigError, match=r"phase\.0: ema rates must differ"):
        load_config("fashion-mnist", [rates])
    assert load_config("fashion-mnist", ["phase.0.ema=[0.99, 0.999]"]).phase[0].ema == (0.99, 0.999)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("network.chanels=3", "network.chanels: unknown key; did you mean channels or"),
        ("phase.1.stage=3", "phase.1.stage: unknown key; did you mean stages"),
        ("sed=3", "sed: unknown key; did you mean seed?"),
        ("network.width=3", "network.width: unknown key; there are "),
    ],
)
def test_an_unknown_key_is_answered_with_those_that_exist(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("fashion-mnist-tiny", [setting])
    assert words in str(caught.value)
    if "there are" in words:
        assert "channels, " in str(caught.value) and "phase" not in str(caught.value).partition("there are")[2]
