"""cm_runtime/checkpoints against diffusers itself: its folders, its networks, its scheduler, its pipeline."""

from __future__ import annotations

import gc
import json
import pickle
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import CONFIGS, GREY, IMAGENET, SCRIPT, Bomb, f_of, save_pipeline, unet2d

import cm_runtime as cm
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.cli import main
from cm_runtime.errors import CheckpointError, CmRuntimeError, OutputError, RequestError
from cm_runtime.export import parity
from cm_runtime.manifest import Manifest
from cm_runtime.schedule import NoiseRange

SIGMAS = (0.002, 0.0021, 0.03, 0.5, 1.382368, 10.0, 80.0)
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return save_pipeline(tmp_path_factory.mktemp("imagenet") / "pipe", IMAGENET)


@pytest.fixture
def copy(imagenet: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(imagenet, tmp_path / "copy"))


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(path: Path, **told: Any) -> str:
    with pytest.raises(CmRuntimeError) as refused:
        cm.load_checkpoint(path, **told)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- the consistency function -----------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("name", CONFIGS)
def test_f_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    from diffusers import ConsistencyModelPipeline

    config = CONFIGS[name]
    folder = save_pipeline(tmp_path / "pipe", config, scheduler={"sigma_data": 0.7, "sigma_min": 0.01, "rho": 5.0})
    theirs = ConsistencyModelPipeline.from_pretrained(folder)
    checkpoint = cm.load_checkpoint(folder)
    ours = checkpoint.model()
    shape = checkpoint.config.image_shape
    assert (checkpoint.config.sigma_data, checkpoint.config.sigma_boundary, checkpoint.config.rho) == (0.7, 0.01, 5.0)
    label = torch.arange(3) % config["num_class_embeds"] if config.get("num_class_embeds") else None
    spread = 0.0
    for sigma in (0.01, *SIGMAS[2:]):
        x = torch.randn(3, *shape) * (sigma**2 + 0.49) ** 0.5
        expected = f_of(theirs.unet, theirs.scheduler, x, sigma, label)
        with torch.no_grad():
            found = ours(x, torch.full((3,), sigma), label)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        spread = max(spread, float((expected - x).abs().max()))
    assert spread > 0.1  # the network was heard


def test_every_tensor_of_the_network_matters(imagenet: Path) -> None:
    """A mapping that exchanged two tensors of a shape would be seen: no two are equal."""
    weights = cm.load_checkpoint(imagenet).ema["imported"]
    sums = {name: (tuple(tensor.shape), float(tensor.double().sum())) for name, tensor in weights.items()}
    assert len(set(sums.values())) == len(sums)


class Draws:
    """Stands in for diffusers' randn_tensor: the noise of each step in turn, then zeros after the last."""

    def __init__(self, noise: np.ndarray) -> None:
        self.left = [torch.from_numpy(z) for z in noise]

    def __call__(self, shape: Any, **_: Any) -> torch.Tensor:
        return self.left.pop(0) if self.left else torch.zeros(tuple(shape))


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("timesteps", [[0], [22, 0], [33, 25, 11, 0]])
@pytest.mark.parametrize("name", ["imagenet", "lsun", "grey"])
def test_the_sampler_draws_what_the_pipeline_draws(
    name: str, timesteps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import ConsistencyModelPipeline
    from diffusers.pipelines.consistency_models import pipeline_consistency_models as drawing
    from diffusers.schedulers import scheduling_consistency_models as stepping

    config = CONFIGS[name]
    folder = save_pipeline(tmp_path / "pipe", config)
    theirs = ConsistencyModelPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    checkpoint = cm.load_checkpoint(folder)
    model = TorchBackend(checkpoint.model(), checkpoint.manifest())
    z = cm.noise.normal(0, np.arange(3, dtype=np.uint64), 0, (len(timesteps), *checkpoint.config.image_shape))
    z = np.ascontiguousarray(z.swapaxes(0, 1))
    draws = Draws(z)
    for module in (drawing, stepping):
        monkeypatch.setattr(module, "randn_tensor", draws)
    label = [i % config["num_class_embeds"] for i in range(3)] if config.get("num_class_embeds") else None
    expected = theirs(
        batch_size=3, timesteps=timesteps, num_inference_steps=None, class_labels=label, output_type="np"
    ).images
    sigmas = NoiseRange().from_timesteps(timesteps, 40)
    found = cm.sample(model, noise=z, sigmas=sigmas, labels=label, output="float32")
    np.testing.assert_allclose(found, expected * 2 - 1, atol=1e-3, rtol=0)
    assert np.abs(found).max() > 0.1 and found.std() > 0.05
    pixels = cm.sample(model, noise=z, sigmas=sigmas, labels=label).astype(int)
    assert np.abs(pixels - np.rint(expected * 255).astype(int)).max() <= 1


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("name", CONFIGS)
def test_from_diffusers_and_back_nothing_changes(name: str, tmp_path: Path) -> None:
    from diffusers import ConsistencyModelPipeline

    scheduler = {"num_train_timesteps": 151, "sigma_max": 60.0}
    folder = save_pipeline(tmp_path / "pipe", CONFIGS[name], scheduler=scheduler)
    cm.export.diffusers(cm.load_checkpoint(folder), tmp_path / "back")
    before, after = (ConsistencyModelPipeline.from_pretrained(where) for where in (folder, tmp_path / "back"))
    schedulers = [dict(pipe.scheduler.config) for pipe in (before, after)]
    assert [config.pop("_diffusers_version", None) is not None for config in schedulers] == [True, False]
    assert schedulers[0] == schedulers[1]
    old, new = before.unet.state_dict(), after.unet.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)
    again = cm.load_checkpoint(tmp_path / "back")
    assert again.config == cm.load_checkpoint(folder).config


@pytest.mark.process
def test_what_came_back_is_sampled_by_the_pipeline(imagenet: Path, tmp_path: Path) -> None:
    from diffusers import ConsistencyModelPipeline

    cm.export.diffusers(cm.load_checkpoint(imagenet), tmp_path / "back")
    images = []
    for folder in (imagenet, tmp_path / "back"):
        theirs = ConsistencyModelPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(theirs(2, [1, 3], num_inference_steps=2, generator=generator, output_type="np").images)
    assert np.array_equal(*images)


# --- folders ----------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    weights = [list(checkpoint.ema["imported"].items()) for checkpoint in (a, b)]
    return a.config == b.config and all(m == n and torch.equal(x, y) for (m, x), (n, y) in zip(*weights, strict=True))


@pytest.mark.process
def test_bin_files_and_shards_hold_the_same(imagenet: Path, tmp_path: Path) -> None:
    plain = cm.load_checkpoint(imagenet)
    for name, how in {
        "bin": {"safe_serialization": False},
        "shards": {"max_shard_size": "300KB"},
        "bin shards": {"safe_serialization": False, "max_shard_size": "300KB"},
        "fp16 name": {"variant": "fp16"},
    }.items():
        folder = save_pipeline(tmp_path / name, IMAGENET, **how)
        assert not (folder / "unet" / f"{WEIGHTS}.safetensors").exists()
        assert same(cm.load_checkpoint(folder), plain), name


@pytest.mark.process
def test_a_bare_unet_takes_the_scheduler_beside_it_or_is_told_the_form(imagenet: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(imagenet / "unet", tmp_path / "bare"))
    assert "export it with --precond boundary (a consistency model), --precond edm" in refusal(bare)
    told = cm.load_checkpoint(bare, precond="boundary")
    assert same(told, cm.load_checkpoint(imagenet))
    edm = cm.load_checkpoint(bare, precond="edm")
    assert (edm.config.precond, edm.config.sigma_boundary) == ("edm", 0.0)
    shutil.copy(imagenet / "scheduler" / "scheduler_config.json", bare)
    assert same(cm.load_checkpoint(bare), told)
    assert "decides the preconditioning form, which is boundary" in refusal(bare, precond="edm")
    assert cm.load_checkpoint(bare, precond="boundary").config == told.config


@pytest.mark.process
def test_names_of_published_conversions_bring_their_levels(imagenet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(imagenet, tmp_path / "diffusers-cd_imagenet64_lpips"))
    manifest = cm.load_checkpoint(folder).manifest()
    assert manifest.sigmas[2] == pytest.approx((80.0, 1.382368), rel=1e-6)
    assert cm.load_checkpoint(imagenet).manifest().sigmas == {}
    assert cm.load_checkpoint(imagenet, model_name="ct_cat256").manifest().sigmas[2][1] == pytest.approx(5.248503)
    assert "edm_cat256_ema" in refusal(imagenet, model_name="cd_cat")
    edited(folder / "scheduler" / "scheduler_config.json", sigma_max=60.0)  # then those levels are not its own
    assert cm.load_checkpoint(folder).manifest().sigmas == {}
    assert "decides the preconditioning form" in refusal(imagenet, model_name="edm_cat256_ema")


def test_old_names_of_attention_are_read(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "unet" / f"{WEIGHTS}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(file).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.") if ".attentions." in name else name
        weights[name] = tensor
    assert any(".proj_attn." in name for name in weights)
    whole = cm.load_checkpoint(copy)
    kept = {name: tensor.clone() for name, tensor in whole.ema["imported"].items()}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)
    found = cm.load_checkpoint(copy).ema["imported"]
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_the_weights_alone_are_refused_with_what_to_give(imagenet: Path) -> None:
    assert "give the folder that diffusers saved" in refusal(imagenet / "unet" / f"{WEIGHTS}.safetensors")


@pytest.mark.process
def test_halves_stay_halves_and_are_computed_in_float32(tmp_path: Path) -> None:
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    network = unet2d(GREY).half()
    ConsistencyModelPipeline(network, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "half")
    checkpoint = cm.load_checkpoint(tmp_path / "half")
    assert {tensor.dtype for tensor in checkpoint.ema["imported"].values()} == {torch.float16}
    assert {tensor.dtype for tensor in checkpoint.model().state_dict().values()} == {torch.float32}
    cm.export.diffusers(checkpoint, tmp_path / "back")
    assert {tensor.dtype for tensor in cm.load_checkpoint(tmp_path / "back").ema["imported"].values()} == {
        torch.float16
    }


# --- what does not map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"center_input_sample": True},
            "1 of 28 options has no counterpart in .* UNet: center_input_sample True: only False",
        ),
        ({"time_embedding_type": "fourier"}, "time_embedding_type fourier"),
        ({"time_embedding_dim": 32}, "time_embedding_dim 32.* only 128"),
        ({"freq_shift": 1}, "freq_shift 1"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos False"),
        ({"mid_block_type": None}, "mid_block_type None"),
        ({"mid_block_scale_factor": 1.414}, "mid_block_scale_factor 1.414"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ({"act_fn": "gelu"}, "act_fn gelu.* only silu"),
        ({"out_channels": 6}, "out_channels 6.* only as many as in_channels, 3"),
        ({"sample_size": None}, "sample_size None"),
        ({"sample_size": [16, 32]}, r"sample_size \[16, 32\]"),
        ({"sample_size": 18}, "image_size 18 must be a multiple of 4"),
        ({"block_out_channels": [32, 64, 80]}, r"block_out_channels \[32, 64, 80\].* 80 is none"),
        ({"block_out_channels": "wide"}, "block_out_channels wide"),
        ({"block_out_channels": [10**9] * 3}, "channels: Input should be less than or equal to 4096"),
        ({"layers_per_block": 99}, "res_blocks"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift spatial"),
        ({"down_block_types": ["AttnSkipDownBlock2D"] * 3}, "down_block_types AttnSkipDownBlock2D"),
        ({"down_block_types": ["DownBlock2D"]}, "only a list as long as block_out_channels, 3"),
        ({"up_block_types": ["AttnUpBlock2D"] * 3}, "up_block_types .* where down_block_types have it"),
        ({"downsample_type": "conv"}, "downsample_type, upsample_type conv and resnet.* only conv or only resnet"),
        ({"downsample_type": "pool", "upsample_type": "pool"}, "pool"),
        ({"downsample_type": ["resnet"], "upsample_type": {}}, "only conv or only resnet"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups None.* only 32, as norm_num_groups"),
        ({"norm_num_groups": 5, "attn_norm_num_groups": 5}, "channels 32 do not split into norm_groups 5"),
        ({"attention_head_dim": 20}, "do not split into heads of 20"),
        ({"attention_head_dim": None}, r"attention_head_dim None.* not \[64, 96\]"),
        ({"num_class_embeds": -3}, "num_classes"),
        ({"encoder_hid_dim": 3}, "encoder_hid_dim is no option of UNet2DModel"),
        ({"_class_name": "UNet2DConditionModel"}, "its config.json is of a UNet2DConditionModel"),
    ],
    ids=str,
)
def test_a_network_without_a_counterpart_is_refused_by_its_option(copy: Path, changes: Any, complaint: str) -> None:
    edited(copy / "unet" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=complaint):
        cm.load_checkpoint(copy)


def test_all_options_without_a_counterpart_are_named_at_once(copy: Path) -> None:
    """What a configuration of diffusers' own defaults has beside scale_shift, and more."""
    changes = {"downsample_type": "conv", "attn_norm_num_groups": None, "freq_shift": 1, "act_fn": "gelu"}
    edited(copy / "unet" / "config.json", **changes)
    line = refusal(copy)
    assert "4 of 28 options have no counterpart in cm-runtime's UNet: freq_shift 1: only 0; act_fn gelu: only" in line
    assert "attn_norm_num_groups None: only 32" in line and "conv and resnet: only conv or only resnet" in line
    edited(copy / "unet" / "config.json", b_option=1, a_option=2)
    assert "a_option and b_option are no options of UNet2DModel" in refusal(copy)


def test_all_options_of_a_scheduler_too(copy: Path) -> None:
    edited(copy / "scheduler" / "scheduler_config.json", s_noise=1.01, clip_denoised=False, rho="7")
    line = refusal(copy)
    assert "3 of 7 options have no counterpart in cm-runtime's sampler" in line and "rho 7: only a number" in line


def test_convolutions_that_pad_otherwise_are_refused(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "pipe", {**SCRIPT, "downsample_padding": 0})
    assert "downsample_padding 0: only 1" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"_class_name": "DDPMScheduler"}, "its scheduler is DDPMScheduler, not that of consistency models"),
        ({"s_noise": 1.01}, "s_noise 1.01"),
        ({"clip_denoised": False}, "clip_denoised False"),
        ({"sigma_min": -1}, "sigma_boundary|sigma_min"),
        ({"sigma_min": 90.0}, "must lie below sigma_max"),
        ({"sigma_data": "wide"}, "sigma_data wide"),
        ({"rho": True}, "rho True"),
        ({"rho": 1e9}, "rho"),
        ({"sigma_max": float("inf")}, "sigma_max"),
        ({"num_train_timesteps": float("inf")}, "num_train_timesteps inf"),
        ({"num_train_timesteps": 1}, "num_train_timesteps 1.* only a whole number from 2"),
        ({"solver": "heun"}, "solver is no option of CMStochasticIterativeScheduler"),
    ],
    ids=str,
)
def test_another_scheduler_is_refused_by_its_option(copy: Path, changes: Any, complaint: str) -> None:
    edited(copy / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(CmRuntimeError, match=complaint):
        cm.load_checkpoint(copy)


@pytest.mark.process
def test_tensors_that_do_not_fit_are_listed_by_their_own_names(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "unet" / f"{WEIGHTS}.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    del weights["conv_out.bias"]
    weights["mid_block.attentions.0.to_k.weight"] = torch.zeros(96, 95)
    weights["teacher.weight"] = torch.zeros(3)
    save_file(weights, file)
    line = refusal(copy)
    assert str(copy) in line
    for part in (
        "missing conv_out.bias",
        "unexpected teacher.weight",
        "mid_block.attentions.0.to_k.weight is (96, 95) and should be (96, 96)",
    ):
        assert part in line
    weights = {name: tensor for name, tensor in load_file(file).items() if name != "teacher.weight"}
    for name in list(weights)[:9]:
        del weights[name]
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)
    assert "more)" in refusal(copy)


# --- files that are wrong ---------------------------------------------------------------------------------------------


def peak() -> int:
    """Bytes that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.process
def test_damaged_and_hostile_files_are_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From Python and from `cm-runtime export`: exit 1, one line, nothing written, no memory taken."""
    file = copy / "unet" / f"{WEIGHTS}.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])

    def with_header(content: Any) -> bytes:
        text = json.dumps(content).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    some = next(name for name in header if name != "__metadata__")
    large = {**header, some: {**header[some], "shape": [10 * 2**28], "data_offsets": [0, 10 * 2**30]}}
    cases = {
        "truncated": whole[: len(whole) // 2],
        "truncated header": whole[:100],
        "empty": b"",
        "10 GB of header": struct.pack("<Q", 10 * 2**30) + whole[8:],
        "10 GB of a tensor": with_header(large),
        "not JSON": struct.pack("<Q", 3) + b"abc",
    }
    cm.load_checkpoint(copy)
    capsys.readouterr()
    before = peak()
    for name, content in cases.items():
        file.write_bytes(content)
        line = refusal(copy)
        assert "is not a safetensors file, or is damaged" in line, name
        assert run("export", copy) == 1
        assert capsys.readouterr().err == f"error: {line}\n"
    assert peak() - before < 64 << 20
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    file.unlink()
    assert f"it has no {WEIGHTS}.safetensors or .bin" in refusal(copy)
    canary = copy.parent / "executed"
    bin_file = copy / "unet" / f"{WEIGHTS}.bin"
    bin_file.write_bytes(pickle.dumps({"conv_in.weight": Bomb(canary)}))
    assert "is a pickle that could run code" in refusal(copy)
    torch.save([torch.zeros(3)], bin_file)
    assert "holds no tensors by name" in refusal(copy)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ({"weight_map": {"a": "../../secret.bin"}}, "names a shard in another folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names a shard in another folder"),
        ({"weight_map": {"a": "none.safetensors"}}, "none.safetensors: no such file"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": 3}, "has no weight_map"),
        ([], "holds no JSON object"),
    ],
    ids=str,
)
def test_an_index_that_lies_is_refused(copy: Path, index: Any, complaint: str) -> None:
    (copy / "unet" / f"{WEIGHTS}.safetensors").unlink()
    (copy / "unet" / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    assert complaint in refusal(copy)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"3", b"null"], ids=repr)
def test_a_config_that_is_not_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / "unet" / "config.json").write_bytes(content)
    line = refusal(copy)
    assert "is not valid JSON" in line or "holds no JSON object" in line or "is not text in UTF-8" in line


def test_other_folders_are_refused(tmp_path: Path) -> None:
    assert "is no diffusers folder of a UNet2DModel: there is no config.json" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none")


def test_options_that_the_folder_answers_itself_are_refused(imagenet: Path) -> None:
    for option, value in (("head_channels", 64), ("image_size", 64)):
        with pytest.raises(RequestError, match=f"leave --{option.replace('_', '-')} out"):
            cm.load_checkpoint(imagenet, **{option: value})


@pytest.mark.process
def test_the_weights_are_unmapped_before_an_engine_loads_its_own(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of weights is mapped into memory; one tensor that somebody remembers would keep all of it."""
    mapped: list[bool] = []

    def watching(real: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any) -> Any:
            gc.collect()
            mapped.append(str(imagenet) in Path("/proc/self/maps").read_text())
            return real(*given)

        return watched

    for name in ("answers", "measure"):
        monkeypatch.setattr(parity, name, watching(getattr(parity, name)))
    kept = cm.load_checkpoint(imagenet)
    weights = {name: tensor.clone() for name, tensor in kept.ema["imported"].items()}
    cm.export.onnx(kept, tmp_path / "kept.onnx")
    assert all(torch.equal(kept.ema["imported"][name], tensor) for name, tensor in weights.items())  # they are its own
    del kept
    cm.export.onnx(cm.load_checkpoint(imagenet), tmp_path / "m.onnx")
    assert mapped == [True, True, True, False]


# --- the commands -----------------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


@pytest.mark.process
def test_an_imported_model_is_exported_sampled_and_described(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", imagenet, "-o", tmp_path / "m.onnx") == 0
    assert (
        run("sample", tmp_path / "m.onnx", "--batch", 3, "--timesteps", "22,0", "--grid", 40, "-o", tmp_path / "a.npz")
        == 0
    )
    assert run("sample", imagenet, "--batch", 3, "--ts", "0,22,39", "--grid", 40, "-o", tmp_path / "b.npz") == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (3, 16, 16, 3)
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    capsys.readouterr()
    assert run("info", imagenet) == 0
    assert "boundary" in capsys.readouterr().out
    manifest: Manifest = cm.load(tmp_path / "m.onnx").manifest
    assert manifest.training is not None and manifest.training.config["imported_from"] == "diffusers"


@pytest.mark.process
def test_a_folder_of_diffusers_is_a_model_to_every_command(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (imagenet, imagenet / "unet"):
        assert run("eval", folder, "--ts", "0,22", "--grid", 40) == 1
        err = capsys.readouterr().err
        assert "would leave noise" in err or "does not say its preconditioning form" in err
        assert run("tune", folder, "-o", tmp_path / "t.onnx") == 1
        assert "is a checkpoint; tune what cm-runtime export makes of it" in capsys.readouterr().err
    pictures = tmp_path / "pictures"  # a folder of anything else is a data set
    pictures.mkdir()
    assert run("eval", pictures) == 1
    assert "holds no data that can be read" in capsys.readouterr().err


@pytest.mark.process
def test_export_to_diffusers_and_back_by_the_command_line(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder"
    words = "export", imagenet, "--format", "diffusers", "-o", out
    assert run(*words) == 0
    assert same(cm.load_checkpoint(out), cm.load_checkpoint(imagenet))
    assert run(*words) == 1
    assert "exists; replace it with --force" in capsys.readouterr().err
    assert run(*words, "--force") == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert run("export", imagenet, "--format", "diffusers", "-o", other, "--force") == 1
    assert "is not a folder that diffusers saved" in capsys.readouterr().err
    assert (other / "thesis.txt").exists()
    assert run("export", imagenet, "--format", "diffusers", "-o", tmp_path / "no" / "folder") == 1
    assert run("export", imagenet, "--format", "diffusers", "--inline", "-o", tmp_path / "x") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "other"]


@pytest.mark.process
def test_a_full_disk_leaves_no_half_folder(imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoint = cm.load_checkpoint(imagenet)
    cm.export.diffusers(checkpoint, tmp_path / "kept")
    before = (tmp_path / "kept" / "unet" / f"{WEIGHTS}.safetensors").read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for name in ("kept", "new"):
        with pytest.raises(CmRuntimeError, match="No space left on device"):
            cm.export.diffusers(checkpoint, tmp_path / name, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "unet" / f"{WEIGHTS}.safetensors").read_bytes() == before


def test_a_disk_that_is_full_for_safetensors_is_one_line(imagenet: Path, tmp_path: Path) -> None:
    """Its own error, which is no OSError; a limit on the size of files stands in for the disk."""
    checkpoint = cm.load_checkpoint(imagenet)
    cm.export.diffusers(checkpoint, tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, hard))
    try:
        with pytest.raises(OutputError, match=r"m cannot be written: .*File too large") as caught:
            cm.export.diffusers(checkpoint, tmp_path / "m", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_a_kill_left_moved_aside_is_there_again_at_the_next_export(
    imagenet: Path, tmp_path: Path
) -> None:
    """As on a file system that cannot swap two folders."""
    checkpoint = cm.load_checkpoint(imagenet)
    cm.export.diffusers(checkpoint, tmp_path / "m")
    aside = tmp_path / ".cm-01234567.diffusers" / "replaced"
    aside.mkdir(parents=True)
    (tmp_path / "m").rename(aside / "m")
    with pytest.raises(OutputError, match="m exists; replace it with --force"):
        cm.export.diffusers(checkpoint, tmp_path / "m")
    assert same(cm.load_checkpoint(tmp_path / "m"), checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
