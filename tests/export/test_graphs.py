"""The graphs: whole samplers against the loop over a denoiser, nothing of sigma left in them, half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import cm_runtime as cm
from cm_runtime import export, noise
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.checkpoints.native import Checkpoint, read_checkpoint
from cm_runtime.errors import EngineError, ParityError, RequestError
from cm_runtime.export import graphs, weights_file
from cm_runtime.export import parity as parity_module
from cm_runtime.export.builder import Graph
from cm_runtime.export.parity_inputs import scaled
from cm_runtime.manifest import Manifest, TrainingSummary, read_manifest
from cm_runtime.networks.consistency import ModelConfig, build

LEVELS = {1: (80.0,), 2: (80.0, 1.382368), 4: (80.0, 17.5, 2.5, 0.17)}
ENGINES = {"ort": OrtBackend, "openvino": OpenVinoBackend}


def labels(manifest: Manifest, n: int) -> np.ndarray[Any, Any] | None:
    return np.arange(n) * 3 % manifest.num_classes if manifest.num_classes else None


# Samplers


@pytest.mark.process
@pytest.mark.covering(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", LEVELS)
def test_a_sampler_draws_what_the_loop_draws_with_a_denoiser(each: exports.Files, steps: int, engine: str) -> None:
    """To one grey level, in batches of 1, 7 and 256, with classes and without."""
    denoiser = OrtBackend(each.onnx)
    sampler = ENGINES[engine](each.exported(graph="sampler", sigmas=LEVELS[steps]))
    for n in (1, 7, 256):
        label = labels(sampler.manifest, n)
        listed = None if label is None else label.tolist()
        z = noise.normals(3, np.arange(n, dtype=np.uint64), steps, sampler.manifest.image_shape)
        wanted = cm.sample(denoiser, noise=z, sigmas=LEVELS[steps], labels=listed, micro_batch=n)
        found = sampler.draw(z, label)
        assert wanted.std() > 10
        assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.process
def test_the_public_functions_draw_by_seed_and_index_from_a_sampler_file(boundary: exports.Files) -> None:
    sampler = cm.load(boundary.exported(graph="sampler", steps=2), backend="ort")
    denoiser = cm.load(boundary.onnx, backend="ort")
    for how in ({"seed": 5, "start": 9}, {"labels": [4, 1]}, {"micro_batch": 3}):
        wanted = cm.sample(denoiser, count=7, steps=2, **how)
        assert np.abs(cm.sample(sampler, count=7, **how).astype(int) - wanted).max() <= 1


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("steps", [1, 3])
def test_inlined_it_has_standard_ops_alone_and_no_function(each: exports.Files, steps: int) -> None:
    plain, inline = (each.exported(graph="sampler", steps=steps, inline=inline) for inline in (False, True))
    model = onnx.load(inline)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    z = noise.normals(0, np.arange(3, dtype=np.uint64), steps, read_manifest(inline).image_shape)
    label = labels(read_manifest(inline), 3)
    one, other = (OrtBackend(path).draw(z, label) for path in (plain, inline))
    assert np.abs(one.astype(int) - other).max() <= 1


def dependent(model: onnx.ModelProto, *inputs: str) -> set[str]:
    """The nodes whose values change with one of the graph's inputs."""
    known = set(inputs)
    found = set()
    for node in model.graph.node:
        if known & set(node.input):
            known |= set(node.output)
            found.add(node.name)
    return found


@pytest.mark.process
def test_nothing_of_the_noise_level_is_computed_in_a_sampler(each: exports.Files) -> None:
    """No logarithm, sine or time embedding; and what does not depend on noise or label is weights alone."""
    path = each.exported(graph="sampler", steps=2)
    model = onnx.load(path)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Log", "Sin", "Cos", "Pow", "Gemm", "Div", "Sqrt"}
    stored = {tensor.name for tensor in model.graph.initializer}
    assert not [name for name in stored if "time_embed" in name or "emb_layers" in name]
    assert "sigma" not in {value.name for value in model.graph.input}
    moving = dependent(model, "noise", "label")
    for node in model.graph.node:
        if node.name not in moving:
            sources = [name for name in node.input if name in stored and not name.startswith("constant_")]
            made_of_weights = sources or any("/" in name for name in node.input)
            assert made_of_weights, f"{node.name} computes a constant"


@pytest.mark.process
def test_a_sampler_file_is_hardly_larger_than_the_denoisers(each: exports.Files) -> None:
    for steps in LEVELS:
        path = each.exported(graph="sampler", sigmas=LEVELS[steps])
        assert path.stat().st_size <= each.onnx.stat().st_size * 1.05 + 1_000_000
    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert len(names) == len(set(names))


@pytest.mark.process
def test_many_classes_keep_their_embedding_and_few_become_a_table(boundary: exports.Files) -> None:
    """5 classes at 2 steps are fewer than the 128 numbers of an embedding; at 40 steps they are more."""
    few = {t.name for t in onnx.load(boundary.exported(graph="sampler", steps=2)).graph.initializer}
    assert "F.label_emb.weight" not in few
    model = boundary.model().eval()
    levels = tuple(np.geomspace(80, 0.01, 40))
    many = graphs.sampler(model, levels).network()
    assert "F.label_emb.weight" in many.weights
    assert not [name for name in many.weights if "time_embed" in name]


@pytest.mark.process
def test_a_sampler_without_classes_scales_and_shifts_as_its_network(
    make_config: Callable[..., ModelConfig], randomised: Callable[..., Any], tmp_path: Path
) -> None:
    config = make_config()
    assert config.network.scale_shift and not config.network.num_classes
    weights = randomised(build(config)).state_dict()
    source = Checkpoint(config, "0.999", {"0.999": weights}, TrainingSummary(method="ect", data="none"))
    parity = export.onnx(source, tmp_path / "m.onnx", graph="sampler", sigmas=LEVELS[2]).manifest.parity
    assert parity is not None
    assert parity.psnr[0] > 60  # a grey level here and there


@pytest.mark.process
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 3}, "draws in 2 steps, at 80, 2.51522, not 3 steps"),
        ({"sigmas": (80.0, 1.0)}, "draws in 2 steps, at 80, 2.51522, not at 80, 1;"),
        ({"sigmas": (80.0, 2.51521)}, "at 80, 2.51522, not at 80, 2.51521;"),
        ({"steps": 1}, "not 1 step;"),
        ({"output": "float32"}, "uint8"),
        ({"clip": False}, "clamped at each step"),
    ],
)
def test_a_sampler_file_refuses_what_it_was_not_made_for(
    boundary: exports.Files, how: dict[str, Any], message: str
) -> None:
    sampler = OrtBackend(boundary.exported(graph="sampler", steps=2))
    with pytest.raises(RequestError, match=message):
        cm.sample(sampler, count=2, **how)
    with pytest.raises(RequestError, match="sampler graph; denoise needs"):
        sampler.denoise(np.zeros((1, 3, 8, 8), np.float32), 1.0, 0)


@pytest.mark.process
@pytest.mark.parametrize("shape", [(1, 3, 3, 8, 8), (2, 3, 3, 8, 9), (2, 0, 3, 8, 8), (2, 3, 8, 8)])
def test_noise_of_another_shape_is_refused(boundary: exports.Files, shape: tuple[int, ...]) -> None:
    sampler = OrtBackend(boundary.exported(graph="sampler", steps=2))
    with pytest.raises(RequestError, match=r"noise must be \(2, N, 3, 8, 8\)"):
        sampler.draw(np.zeros(shape, np.float32), 0)
    with pytest.raises(RequestError, match="finite"):
        sampler.draw(np.full((2, 1, 3, 8, 8), np.nan, np.float32), 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": 2}, "of a sampler"),
        ({"graph": "network", "sigmas": (80.0,)}, "of a sampler"),
        ({"graph": "sampler", "steps": 2, "sigmas": (80.0, 1.0)}, "not both"),
        ({"graph": "sampler", "sigmas": (80.0, 90.0)}, "descend"),
        ({"graph": "sampler", "steps": 0}, "steps"),
    ],
)
def test_levels_that_make_no_sampler_are_refused(
    boundary: exports.Files, tmp_path: Path, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        export.onnx(read_checkpoint(boundary.checkpoint), tmp_path / "m.onnx", **how)
    assert not list(tmp_path.iterdir())


# Numbers that are not finite

PRECISIONS = {
    "ort": OrtBackend,
    "openvino": OpenVinoBackend,
    "openvino bf16": lambda path: OpenVinoBackend(path, options=EngineOptions(device="cpu", precision="bf16")),
}
ON_ENGINES = [pytest.param(name, marks=exports.needs_bf16 if "bf16" in name else ()) for name in PRECISIONS]


@pytest.mark.process
@pytest.mark.covering(1)
@pytest.mark.parametrize("engine", ON_ENGINES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_weight_that_is_not_finite_is_an_error_and_no_image(
    boundary: exports.Files, tmp_path: Path, engine: str, value: float
) -> None:
    """The clamp would turn infinity into white, and NaN into black or anything."""
    path = exports.with_weight(boundary.sampler, tmp_path / "m.onnx", exports.LAST, value, 1)
    with pytest.raises(EngineError, match=r"not finite; its weights .* serve \(3 of 3 images\)$"):
        cm.sample(PRECISIONS[engine](path), 3)


@pytest.mark.process
@pytest.mark.parametrize("engine", ON_ENGINES)
@pytest.mark.parametrize("step", [0, 1])
def test_an_image_is_not_finite_by_itself_at_any_step(edm: exports.Files, engine: str, step: int) -> None:
    """Noise that overflows float32 at its level, in one image of three."""
    sampler = PRECISIONS[engine](edm.sampler)
    z = noise.normals(0, np.arange(3, dtype=np.uint64), 2, sampler.manifest.image_shape)
    sampler.draw(z)
    z[step, 1] = np.finfo(np.float32).max
    with pytest.raises(EngineError, match=r"\(1 of 3 images\)$"):
        sampler.draw(z)


@pytest.mark.process
def test_what_overflows_float16_inside_is_an_error_and_no_image(boundary: exports.Files, tmp_path: Path) -> None:
    """Where the engine computes in float16; OpenVINO does not, and its images of the same file are sound."""
    path = exports.with_weight(boundary.half_sampler, tmp_path / "m.onnx", exports.FIRST, 6e4)
    with pytest.raises(EngineError, match="not finite"):
        cm.sample(OrtBackend(path), 2)
    assert cm.sample(OpenVinoBackend(path), 2).std() > 10


@pytest.mark.process
def test_an_export_whose_images_are_not_finite_is_not_written(boundary: exports.Files, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not finite"):
        export.onnx(loud(boundary, 1e5), tmp_path / "m.onnx", graph="sampler", steps=2, precision="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
def test_a_sampler_of_before_draws_the_same_bytes_and_says_once_what_it_cannot(
    each: exports.Files, tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = exports.without_finite(each.sampler, tmp_path / f"{engine}.onnx")
    made = [cm.sample(ENGINES[engine](old), 5) for _ in range(2)]
    assert [line.message for line in caplog.records] == [
        f"{old} cannot tell images whose numbers are not finite from others; export it again"
    ]
    caplog.clear()
    wanted = cm.sample(ENGINES[engine](each.sampler), 5)
    assert not caplog.records
    assert wanted.std() > 10
    assert all(np.array_equal(images, wanted) for images in made)


# The network alone


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_network_graph_is_F(each: exports.Files, precision: str) -> None:
    path = each.exported(graph="network", precision=precision)
    model, config = each.model().eval(), exports.checkpoint(each.kind).config
    kind = np.float32 if precision == "fp32" else np.float16
    x = np.random.default_rng(0).standard_normal((3, *config.image_shape)).astype(kind)
    c_noise = np.array([1095.5, 81.0, -1553.0], np.float32)
    feed = {"x_in": x, "c_noise": c_noise}
    if config.network.num_classes:
        feed["label"] = np.array([4, 0, 2])
    (F,) = onnxruntime.InferenceSession(str(path)).run(["F"], feed)
    with torch.inference_mode():
        wanted = model.F(*(torch.from_numpy(v.astype(np.float32) if k == "x_in" else v) for k, v in feed.items()))
    assert F.dtype == np.float32
    assert np.abs(F - wanted.numpy()).max() < (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_with_its_coefficients_around_it_the_network_graph_is_f(each: exports.Files, precision: str) -> None:
    path = each.exported(graph="network", precision=precision)
    for engine in (OrtBackend(path), OpenVinoBackend(path)):
        config = each.model().config
        x = np.random.default_rng(0).standard_normal((7, *config.image_shape)).astype(np.float32)
        sigma = np.geomspace(0.002, 80, 7).astype(np.float32)
        label = np.arange(7) % config.network.num_classes if config.network.num_classes else None
        wanted = OrtBackend(each.onnx).denoise(sigma[:, None, None, None] * x, sigma, label)
        found = engine.denoise(sigma[:, None, None, None] * x, sigma, label)
        assert np.abs(found - wanted).max() < (1e-4 if precision == "fp32" else 0.05)
        if precision == "fp32":
            images = cm.sample(engine, 5, micro_batch=3)
            assert np.abs(images.astype(int) - cm.sample(OrtBackend(each.onnx), 5)).max() <= 1


@pytest.mark.process
@exports.needs_bf16
def test_what_numpy_cannot_feed_is_refused(boundary: exports.Files) -> None:
    engine = OpenVinoBackend(boundary.exported(graph="network", precision="bf16"))
    with pytest.raises(RequestError, match="a network graph in bf16 is sampled on a GPU alone"):
        cm.sample(engine, 1)


# Half precision


@pytest.mark.process
@pytest.mark.covering(2)
@pytest.mark.parametrize("graph", ["denoiser", "sampler"])
@pytest.mark.parametrize("precision", exports.HALVES)
def test_half_precision_keeps_40_dB_at_every_noise_level(each: exports.Files, precision: str, graph: str) -> None:
    """fp16 in ONNX Runtime, and bf16 in OpenVINO, by the export itself; fp16 in OpenVINO too; and half the size."""
    path = each.exported(graph=graph, precision=precision)
    parity = read_manifest(path).parity
    assert parity is not None
    assert parity.engine.startswith("onnxruntime" if precision == "fp16" else "openvino")
    assert min(parity.psnr) >= 40
    other = OpenVinoBackend(path)
    if precision == "fp16":
        manifest = other.manifest
        asked = list(parity_module.inputs(manifest))
        answers = parity_module.answers(each.model().eval(), manifest)
        for given, wanted in zip(asked, answers, strict=True):
            error = scaled(other.evaluate(given)) - scaled(wanted)
            assert 10 * np.log10(4 / np.maximum(np.mean(error**2, axis=(1, 2, 3)), 1e-20)).min() >= 40
    assert path.stat().st_size < 0.7 * each.exported(graph=graph).stat().st_size


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize("precision", exports.HALVES)
def test_the_islands_are_float32(each: exports.Files, precision: str) -> None:
    """Every normalisation's statistics, and the last convolution's weights."""
    model = onnx.load(each.exported(precision=precision))
    half = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    casts = {node.output[0]: node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"}
    reshaped = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    normalised = [node for node in model.graph.node if node.op_type in ("InstanceNormalization", "LayerNormalization")]
    assert len(normalised) > 10
    assert {casts[reshaped[node.input[0]]] for node in normalised} == {TensorProto.FLOAT}
    assert types["F.out.2.weight"] == TensorProto.FLOAT
    assert types["F.input_blocks.0.0.weight"] == half
    assert types["F.middle_block.1.qkv.weight"] == half


def loud(files: exports.Files, factor: float) -> Checkpoint:
    """The same network with its first convolution ``factor`` times as large: so are the activations behind it."""
    ours = read_checkpoint(files.checkpoint)
    (named,) = ours.ema.values()
    for name in ("F.input_blocks.0.0.weight", "F.input_blocks.0.0.bias"):
        named[name] *= factor
    return ours


@pytest.mark.process
def test_float16_stays_finite_where_sums_of_squares_do_not(boundary: exports.Files, tmp_path: Path) -> None:
    """Activations of some thousands, whose squares float16 cannot hold, at sigma 80 too."""
    checkpoint = loud(boundary, 2000.0)
    path = tmp_path / "loud.onnx"
    parity = export.onnx(checkpoint, path, precision="fp16").manifest.parity
    assert parity is not None and parity.sigmas[-1] == 80
    assert min(parity.psnr) >= 40
    for name, engine in ENGINES.items():
        x = noise.normal(0, np.arange(7), 0, (3, 8, 8)) * np.float32(80)
        assert np.isfinite(engine(path).denoise(x, 80.0, 0)).all(), name


@pytest.mark.process
def test_activations_that_float16_cannot_hold_are_refused_not_written(boundary: exports.Files, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"fp16 export differs .* \(-inf dB\)"):
        export.onnx(loud(boundary, 1e5), tmp_path / "m.onnx", precision="fp16")
    assert not list(tmp_path.iterdir())
    export.onnx(loud(boundary, 1e5), tmp_path / "m.onnx")


def test_the_writer_names_each_node_once_and_each_weight_as_the_checkpoint_does(each: exports.Files) -> None:
    g: Graph = graphs.denoiser(each.model().eval())
    network = g.network()
    names = [node.name for node in network.graph.graph.node]
    assert len(names) == len(set(names))
    assert set(network.weights) == set(exports.checkpoint(each.kind).ema["0.999"])
    weights_file.write(network, Path("/dev/null"))
