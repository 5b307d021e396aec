"""F for inference against the published module in float32, and what it moves: strides, casts and copies of a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import exports
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cm_runtime.backends import torch_layers
from cm_runtime.backends.torch_unet import InferenceModel, InferenceUNet
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build

TYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES: dict[str, dict[str, Any]] = {
    "scale and shift": {},
    "added embedding": {"scale_shift": False},
    "attention in levels": {"attention": (4, 8), "num_classes": 5},
    "resampled by blocks": {"resample": "resblock", "channel_mult": (1, 2, 2)},
    "added embedding, by blocks": {"scale_shift": False, "resample": "resblock", "attention": (4,)},
    "no attention": {"middle_attention": False, "image_channels": 1},
    "patches of one channel": {"patch": 2, "image_channels": 1, "num_classes": 5},
    "channels of no power of two": {"channels": 20, "head_channels": 10, "image_channels": 2},
    "groups of its own": {"norm_groups": 4, "norm_eps": 1e-3, "image_channels": 4, "patch": 2},
}

Make = Callable[..., Any]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def model(request: pytest.FixtureRequest, make_config: Make, randomised: Make) -> ConsistencyModel:
    made: ConsistencyModel = randomised(build(make_config(**SHAPES[request.param])))
    return made


def inputs(config: ModelConfig, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Images at noise levels from the least to the largest, and labels where there are classes."""
    generator = torch.Generator().manual_seed(n)
    sigma = torch.logspace(-2.7, 1.9, n) if n > 1 else torch.tensor([2.0])
    x = torch.randn((n, *config.image_shape), generator=generator) * torch.hypot(sigma, torch.tensor(0.5)).reshape(
        -1, 1, 1, 1
    )
    return x, sigma, torch.arange(n) % config.network.num_classes if config.network.num_classes else None


def decibels(error: torch.Tensor) -> torch.Tensor:
    """Of each image, of a range of 2."""
    return 10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)).clamp_min(1e-20))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_computes_what_the_published_module_does(model: ConsistencyModel, dtype: torch.dtype) -> None:
    """f at noise levels from 0.002 to 80, and for 1, 3 and 7 images."""
    inference = InferenceModel(model, dtype)
    for n in (1, 3, 7):
        x, sigma, label = inputs(model.config, n)
        f, wanted = inference(x, sigma, label), model(x, sigma, label)
        assert f.dtype == torch.float32
        if dtype is torch.float32:
            assert (f - wanted).abs().max() <= 1e-5
        else:
            assert decibels(f - wanted).min() >= 40


@torch.inference_mode()
@pytest.mark.parametrize("kind", exports.KINDS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_checkpoints_of_all_forms_too(request: pytest.FixtureRequest, kind: str, dtype: torch.dtype) -> None:
    trained = exports.checkpoint(kind).model().eval()
    x, sigma, label = inputs(trained.config, 7)
    error = InferenceModel(trained, dtype)(x, sigma, label) - trained(x, sigma, label)
    assert error.abs().max() <= 1e-5 if dtype is torch.float32 else decibels(error).min() >= 40


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_standing_network_too(dtype: torch.dtype) -> None:
    from cm_runtime.bench.networks import config, random_checkpoint

    standing = random_checkpoint(config("cifar32")).model().eval()
    x, sigma, label = inputs(standing.config, 3)
    error = InferenceModel(standing, dtype)(x, sigma, label) - standing(x, sigma, label)
    assert error.abs().max() <= 1e-5 if dtype is torch.float32 else decibels(error).min() >= 40


def test_weights_are_copied_once_and_only_where_type_or_layout_differ(make_config: Make) -> None:
    model = build(make_config(num_classes=5))
    published = {weight.data_ptr() for weight in model.parameters()}
    network = InferenceUNet(model.F, torch.float16)
    for name, weight in network.state_dict().items():
        is_full = any(part in name for part in ("gamma", "beta", "offset", "last", "time_embed", "label_emb"))
        assert weight.dtype == (torch.float32 if is_full else torch.float16), name
    shared = InferenceUNet(model.F, torch.float32).state_dict()
    own = {name for name, weight in shared.items() if weight.data_ptr() not in published}
    ends = {name.rpartition(".")[2] for name in own if "embeddings" not in name}  # which are stacked
    assert ends == {"weight", "offset", "missing"}  # of 3x3 convolutions, in NHWC; what biases come to
    assert not list(network.parameters())  # nothing to train
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


COPIES = ("_to_copy", "clone", "copy_", "contiguous")


class Trace(TorchDispatchMode):
    """Operators of an evaluation: casts and copies of feature maps and weights, and strides at convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.convolutions: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in COPIES and max(each.dim() for each in tree_leaves(args) if isinstance(each, torch.Tensor)) > 2:
            self.copies.append(f"{name} {tuple(output.shape)} {output.dtype}")
        if name == "convolution":
            self.convolutions.append((args[0], args[1], output))
        return output


def trace(model: ConsistencyModel, dtype: torch.dtype, n: int = 3) -> Trace:
    x, sigma, label = inputs(model.config, n)
    network = InferenceUNet(model.F, dtype)
    x_in = x.to(dtype, memory_format=torch.channels_last)
    with torch.no_grad(), Trace() as traced:
        network(x_in, sigma, label)
    return traced


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nothing_is_cast_or_copied_but_for_the_last_convolution(model: ConsistencyModel, dtype: torch.dtype) -> None:
    """Of feature maps and weights: the input of the last convolution alone becomes float32."""
    _, h, w = model.config.image_shape
    patch, channels = model.config.network.patch, model.config.network.channels
    last = f"_to_copy {(3, channels, h // patch, w // patch)} torch.float32"
    assert trace(model, dtype).copies == ([] if dtype is torch.float32 else [last])


def test_a_copy_is_seen_where_there_is_one(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, of feature maps that become NCHW and back."""
    model = build(make_config())
    monkeypatch.setattr(torch_layers, "_rows", lambda x: x.contiguous().permute(0, 2, 3, 1).reshape(-1, x.shape[1]))
    assert any(line.startswith("clone") for line in trace(model, torch.float16).copies)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_every_convolution_reads_and_writes_channels_last(model: ConsistencyModel, dtype: torch.dtype, n: int) -> None:
    traced = trace(model, dtype, n).convolutions
    assert len(traced) == sum(
        isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) for layer in model.F.modules()
    )
    for arrays in traced:
        for array in arrays:
            assert array.is_contiguous(memory_format=torch.channels_last), (array.shape, array.stride())
            assert array.shape[1] == 1 or array.stride(1) == 1
    assert {array.dtype for arrays in traced[:-1] for array in arrays} == {dtype}
    assert {array.dtype for array in traced[-1]} == {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(900)
@torch.inference_mode()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_it_compiles_as_a_whole(make_config: Make, randomised: Make, dtype: torch.dtype) -> None:
    """In one graph, whose convolutions and norms are in NHWC too."""
    model = randomised(build(make_config(**SHAPES["resampled by blocks"], num_classes=5)))
    network = InferenceUNet(model.F, dtype)
    x, sigma, label = inputs(model.config, 3)
    x = x.to(dtype, memory_format=torch.channels_last)
    found = torch.compile(network, fullgraph=True, dynamic=False)(x, sigma, label)
    allowed = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    assert (found - network(x, sigma, label)).abs().max() <= allowed
