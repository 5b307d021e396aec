"""Engines built by TensorRT for RTX, which needs no GPU for it; what needs one runs on a stand-in, as its file says."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import stand_in_gpu
from onnx import TensorProto, helper

from cm_runtime import onnx_graph
from cm_runtime.backends import engine_file, tensorrt_cache
from cm_runtime.backends.batch_profiles import Profile, parse_profiles
from cm_runtime.backends.engine_file import EngineManifest, Package, read_engine, read_engine_manifest
from cm_runtime.backends.tensorrt import TensorRtBackend
from cm_runtime.cuda.driver import Gpu
from cm_runtime.errors import (
    ArtifactError,
    CmRuntimeError,
    EngineError,
    MissingExtraError,
    OutputError,
    ParityError,
    RequestError,
)
from cm_runtime.export import to_tensorrt
from cm_runtime.export.to_tensorrt import BuildOptions
from cm_runtime.extras import EXTRAS
from cm_runtime.files import atomic
from cm_runtime.manifest import METADATA_KEY, Manifest, Parity, read_manifest

trt = pytest.importorskip("tensorrt_rtx")

BATCH = parse_profiles("1:4:8")
GPUS = ("8.9", "12.0")


def build(
    source: Path,
    path: Path,
    package: Package,
    *,
    profile: tuple[Profile, ...] = (),
    gpus: Sequence[str] = (),
    force: bool = False,
) -> EngineManifest:
    return to_tensorrt.build(source, path, package, BuildOptions(profile, tuple(gpus)), force=force)


def compiler_of(profiles: tuple[Profile, ...] = BATCH, package: Package = "tensorrt_rtx", **others: Any) -> Any:
    return to_tensorrt._Compiler(trt, package, BuildOptions(profiles, GPUS, **others), Gpu("A GPU", "8.9"), Path("log"))


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most graphs here are written by hand."""
    monkeypatch.setenv(onnx_graph.TRUST, "1")


@pytest.fixture
def no_gpu() -> Iterator[None]:
    with stand_in_gpu.absent():
        yield


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A denoiser of three nodes, which builds in a moment."""
    return graph(tmp_path / "small.onnx")


def graph(path: Path, kind: str = "Mul", **changes: Any) -> Path:
    """denoised = x . column(sigma), where the node in the middle is of ``kind``."""
    nodes = [
        helper.make_node("Constant", [], ["column"], value_ints=[-1, 1, 1, 1]),
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node(kind, ["x", "s"], ["denoised"], name="middle"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 4, 4]) for name in ("x", "denoised"))
    sigma = helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["N"])
    return saved(path, helper.make_graph(nodes, "small", [x, sigma], [y]), **changes)


def sampler(path: Path) -> Path:
    """A graph with the interface of a sampler's: the first noise as grey levels, clipped."""
    nodes = [
        helper.make_node("Constant", [], ["pixels"], value_ints=[1, 2, 3]),
        helper.make_node("Constant", [], ["largest"], value_float=2.0**126),
        helper.make_node("Constant", [], ["zero"], value_int=0),
        helper.make_node("Gather", ["noise", "zero"], ["first"], axis=0),
        helper.make_node("Constant", [], ["low"], value_float=-1.0),
        helper.make_node("Constant", [], ["high"], value_float=1.0),
        helper.make_node("Clip", ["first", "low", "high"], ["clipped"]),
        helper.make_node("Add", ["clipped", "high"], ["up"]),
        helper.make_node("Constant", [], ["half"], value_float=127.5),
        helper.make_node("Mul", ["up", "half"], ["grey"]),
        helper.make_node("Round", ["grey"], ["whole"]),
        helper.make_node("Transpose", ["whole"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["last"], ["images"], to=TensorProto.UINT8),
        helper.make_node("ReduceSum", ["first", "pixels"], ["total"], keepdims=0),
        helper.make_node("Abs", ["total"], ["size"]),
        helper.make_node("LessOrEqual", ["size", "largest"], ["finite"]),
    ]
    noise = helper.make_tensor_value_info("noise", TensorProto.FLOAT, [2, "N", 3, 4, 4])
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 4, 4, 3])
    finite = helper.make_tensor_value_info("finite", TensorProto.BOOL, ["N"])
    return saved(
        path, helper.make_graph(nodes, "s", [noise], [images, finite]), graph="sampler", sigmas={2: (80.0, 2.5)}
    )


def saved(path: Path, inside: onnx.GraphProto, **changes: Any) -> Path:
    plain = {"graph": "denoiser", "image_shape": (3, 4, 4), "num_classes": 0, "precond": "edm", "sigma_boundary": 0}
    whole = helper.make_model(inside, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(whole, {METADATA_KEY: Manifest(**{**plain, **changes}).model_dump_json()})
    onnx.save(whole, path)
    return path


def left(folder: Path) -> set[str]:
    """What was written, beside the graphs."""
    return {path.name for path in folder.iterdir() if path.suffix not in (".onnx", ".data")}


# Real builds


@pytest.mark.process
@pytest.mark.quick("edm")
def test_every_form_builds_for_two_gpus(each: exports.Files, no_gpu: None, tmp_path: Path) -> None:
    """Local functions, classes and a dynamic batch are read; the engine and its manifest fit each other."""
    path = tmp_path / "model.engine"
    manifest = build(each.onnx, path, "tensorrt_rtx", profile=BATCH, gpus=GPUS)
    assert manifest == read_engine_manifest(path)
    assert left(tmp_path) == {"model.engine", "model.engine.json", "model.engine.log"}
    content = path.read_bytes()
    assert (manifest.bytes, manifest.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.bytes > 100_000
    assert (manifest.package, manifest.version) == ("tensorrt_rtx", trt.__version__)
    assert (manifest.gpus, manifest.gpu_name, manifest.profiles) == (GPUS, "", BATCH)
    assert manifest.model == read_manifest(each.onnx)
    assert (manifest.onnx_sha256, manifest.data_sha256) == (atomic.sha256(each.onnx), None)
    assert (manifest.parity, manifest.plugin) == (None, False)
    assert read_engine(path, manifest, "tensorrt_rtx", trt.__version__, "12.0") == content
    log = (tmp_path / manifest.log).read_text()
    assert log.startswith(f"tensorrt_rtx {trt.__version__}: model.onnx for 8.9, 12.0, batches 1:4:8\n")
    assert "Engine generation completed" in log
    assert "[ERROR]" not in log


@pytest.mark.process
@pytest.mark.quick("half_apart")
@pytest.mark.parametrize("name", ["apart", "half", "half_apart", "inline"])
def test_weights_beside_the_graph_and_stored_as_halves_build(
    boundary: exports.Files, no_gpu: None, tmp_path: Path, name: str
) -> None:
    source = getattr(boundary, name)
    manifest = build(source, tmp_path / "m.engine", "tensorrt_rtx", profile=BATCH, gpus=["8.9"])
    data = exports.data_file(source) if name.endswith("apart") else None
    assert manifest.data_sha256 == (atomic.sha256(data) if data else None)
    assert (tmp_path / "m.engine").stat().st_size == manifest.bytes > 100_000


def test_a_sampler_with_noise_of_five_dimensions_builds(no_gpu: None, tmp_path: Path) -> None:
    source = sampler(tmp_path / "s.onnx")
    manifest = build(source, tmp_path / "s.engine", "tensorrt_rtx", profile=BATCH, gpus=["8.9"])
    assert manifest.model.graph == "sampler"
    assert manifest.model.steps == 2


def test_the_profiles_by_default_are_up_to_what_a_gpu_sees_at_once(small: Path, no_gpu: None) -> None:
    """RTX compiles for each batch where it runs; TensorRT has kernels for one image beside those for many."""
    manifest = build(small, small.with_suffix(".engine"), "tensorrt_rtx", gpus=["8.9"])
    assert manifest.profiles == parse_profiles("1:256:256")
    assert to_tensorrt._default_profiles(manifest.model, "tensorrt") == parse_profiles("1,2:256:256")


@pytest.mark.process
def test_an_engine_has_a_profile_for_each_batch(small: Path, no_gpu: None, tmp_path: Path) -> None:
    profiles = parse_profiles("1,8,64")
    manifest = build(small, tmp_path / "s.engine", "tensorrt_rtx", profile=profiles, gpus=["8.9"])
    assert manifest.profiles == profiles == read_engine_manifest(tmp_path / "s.engine").profiles
    assert (tmp_path / "s.engine.log").read_text().splitlines()[0].endswith("for 8.9, batches 1,8,64")


def test_float32_is_float32_and_not_tf32(small: Path) -> None:
    """The matrix units' ten bits of mantissa are for networks of halves, whose torso has no more."""
    compiler = compiler_of()
    for precision, allowed in {"fp32": False, "fp16": True, "bf16": True}.items():
        config = trt.Builder(compiler.logger).create_builder_config()
        config.set_flag(trt.BuilderFlag.TF32)
        compiler._configure(config, read_manifest(small).model_copy(update={"precision": precision}))
        assert config.get_flag(trt.BuilderFlag.TF32) is allowed
        found = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
        assert found == [trt.ComputeCapability.SM89, trt.ComputeCapability.SM120]


def test_rtx_engines_take_no_memory_of_their_own(small: Path) -> None:
    """BuilderFlag.REQUIRE_USER_ALLOCATION "ensures that inference will support graph capture"."""
    config = trt.Builder(compiler_of().logger).create_builder_config()
    compiler_of()._configure(config, read_manifest(small))
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


@pytest.mark.parametrize(("level", "expected"), [(None, 5), (0, 0), (3, 3)])
def test_tensorrt_compares_all_kernels_unless_told_to_be_quick(small: Path, level: int | None, expected: int) -> None:
    config = trt.Builder(compiler_of().logger).create_builder_config()
    compiler_of(package="tensorrt", level=level)._configure(config, read_manifest(small))
    assert config.builder_optimization_level == expected


def test_an_optimization_level_that_there_is_not_is_refused(small: Path, tmp_path: Path) -> None:
    for level in (-1, 6):
        with pytest.raises(RequestError, match=f"must be from 0 to 5, not {level}"):
            BuildOptions(level=level)
    with pytest.raises(RequestError, match="TensorRT for RTX has no optimization level"):
        to_tensorrt.build(small, tmp_path / "s.engine", "tensorrt_rtx", BuildOptions(level=3))


class Timings:
    """`trt.ITimingCache` of full TensorRT; TensorRT for RTX has none."""

    def __init__(self, content: bytes) -> None:
        self.content = content if content.startswith(b"timings") else b"timings"

    def serialize(self) -> bytes:
        return self.content + b" and more"


class Config:
    """Of `trt.IBuilderConfig`, what has to do with timings. It refuses those of another GPU."""

    def __init__(self) -> None:
        self.timings: Timings | None = None

    create_timing_cache = Timings

    def set_timing_cache(self, timings: Timings, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if b"elsewhere" not in timings.content:
            self.timings = timings
        return self.timings is timings


def test_timings_are_used_again_by_the_next_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another GPU or a damaged file says is as if nothing had been measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = compiler_of(package="tensorrt")
    for expected in (b"timings", b"timings and more", b"timings and more and more"):
        config = Config()
        timings = compiler._use_timings(config)
        assert (timings.content, config.timings) == (expected, timings)
        tensorrt_cache.save_cache(compiler._timings, timings.serialize())
    tensorrt_cache.save_cache(compiler._timings, b"timings from elsewhere")
    config = Config()
    assert compiler._use_timings(config).content == b"timings"
    assert config.timings
    (file,) = (tmp_path / "cm-runtime" / "tensorrt").iterdir()
    file.write_bytes(b"garbage")
    assert compiler._use_timings(Config()).content == b"timings"
    assert compiler_of(package="tensorrt_rtx")._timings == ""


# Which GPU


def test_without_a_gpu_one_must_be_named(small: Path, no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError,
        match=r"no GPU to build for: there is no .*; name .* with --gpu \(7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1\)",
    ):
        build(small, tmp_path / "s.engine", "tensorrt_rtx")
    assert left(tmp_path) == set()


@pytest.mark.parametrize("gpu", ["6.1", "89", "sm_89", "8.9.", "", "12.0,8.9", "NE"])
def test_a_gpu_that_rtx_has_no_code_for_is_refused_by_name(small: Path, no_gpu: None, tmp_path: Path, gpu: str) -> None:
    with pytest.raises(RequestError, match=r"for GPUs of compute capability 7\.5, .*, 12\.1, not ") as caught:
        build(small, tmp_path / "s.engine", "tensorrt_rtx", gpus=["8.9", gpu])
    assert str(caught.value).endswith(f"not {gpu}")
    assert left(tmp_path) == set()


@pytest.mark.parametrize("gpu", ["9.0", "10.0"])
def test_rtx_names_tensorrt_for_gpus_of_data_centres(small: Path, no_gpu: None, tmp_path: Path, gpu: str) -> None:
    with pytest.raises(RequestError, match=rf"no code for compute capability {gpu} \((H100, H200|B200)\), only for"):
        build(small, tmp_path / "s.engine", "tensorrt_rtx", gpus=[gpu])


def test_tensorrt_itself_needs_the_gpu(small: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_tensorrt, "module", lambda package: trt)
    with pytest.raises(EngineError, match="builds an engine on the GPU that will run it: there is no"):
        build(small, small.with_suffix(".engine"), "tensorrt", gpus=["8.9"])
    monkeypatch.setattr(to_tensorrt, "_gpu_here", lambda: (Gpu("H100", "9.0"), ""))
    with pytest.raises(RequestError, match=r"capability 9\.0, not 8\.9; --format tensorrt-rtx builds for others"):
        build(small, small.with_suffix(".engine"), "tensorrt", gpus=["8.9"])


# What fails leaves the log and nothing else


def test_a_graph_that_tensorrt_cannot_read_names_the_node_and_the_log(no_gpu: None, tmp_path: Path) -> None:
    source = graph(tmp_path / "odd.onnx", "NoSuchOperator")
    path = tmp_path / "odd.engine"
    with pytest.raises(
        ArtifactError, match=r"cannot read it: NoSuchOperator middle: .*Plugin not found.* \(\S*odd\.engine\.log has"
    ):
        build(source, path, "tensorrt_rtx", gpus=["8.9"])
    assert left(tmp_path) == {"odd.engine.log"}
    assert "NoSuchOperator" in engine_file.log_path(path).read_text()
    with pytest.raises(ArtifactError) as caught:  # and again, with the log there
        build(source, path, "tensorrt_rtx", gpus=["8.9"])
    assert "\n" not in str(caught.value)


def test_a_build_that_fails_says_what_the_builder_said_last(
    small: Path, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(builder: Any, network: Any, config: Any) -> None:
        builder.logger.log(trt.ILogger.Severity.ERROR, "no tactic\nfor node middle")

    monkeypatch.setattr(trt.Builder, "build_serialized_network", fail)
    with pytest.raises(
        EngineError, match=r"cannot build it: no tactic for node middle \(\S+small\.engine\.log has all"
    ):
        build(small, tmp_path / "small.engine", "tensorrt_rtx", gpus=["8.9"])
    assert left(tmp_path) == {"small.engine.log"}
    assert "[ERROR] no tactic" in (tmp_path / "small.engine.log").read_text()


def test_a_profile_that_the_graph_does_not_allow_is_one_line(no_gpu: None, tmp_path: Path) -> None:
    """A graph of ours whose batch is fixed, as no export of ours has it."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4, 4]) for name in ("x", "denoised"))
    sigma = helper.make_tensor_value_info("sigma", TensorProto.FLOAT, ["N"])
    nodes = [
        helper.make_node("Constant", [], ["column"], value_ints=[2, 1, 1, 1]),
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["denoised"]),
    ]
    source = saved(tmp_path / "fixed.onnx", helper.make_graph(nodes, "fixed", [x, sigma], [y]))
    with pytest.raises(EngineError, match="cannot build it: ") as caught:
        build(source, tmp_path / "fixed.engine", "tensorrt_rtx", gpus=["8.9"], profile=parse_profiles("4:4:8"))
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == {"fixed.engine.log"}


BAD: dict[str, tuple[str, str, type[CmRuntimeError], str]] = {
    "another ending": ("small.onnx", "small.plan", RequestError, r"ends in \.engine"),
    "no graph": ("none.onnx", "small.engine", ArtifactError, "no such file"),
    "no folder": ("small.onnx", "none/small.engine", OutputError, "there is no folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_paths_that_do_not_fit_are_one_line(small: Path, no_gpu: None, tmp_path: Path, case: str) -> None:
    source, path, error, message = BAD[case]
    with pytest.raises(error, match=message):
        build(tmp_path / source, tmp_path / path, "tensorrt_rtx", gpus=["8.9"])
    assert left(tmp_path) == set()


def test_a_graph_that_export_did_not_write_is_refused(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(onnx_graph.TRUST)
    with pytest.raises(ArtifactError, match="tensorrt_rtx runs only graphs as cm-runtime export writes them"):
        build(sampler(tmp_path / "s.onnx"), tmp_path / "s.engine", "tensorrt_rtx", gpus=["8.9"])


def test_a_foreign_graph_and_lost_weights_are_refused(
    boundary: exports.Files, no_gpu: None, small: Path, tmp_path: Path
) -> None:
    foreign = onnx.load(small)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(ArtifactError, match="was not exported by cm-runtime"):
        build(tmp_path / "foreign.onnx", tmp_path / "m.engine", "tensorrt_rtx", gpus=["8.9"])
    apart = exports.copied(boundary.apart, tmp_path)
    exports.data_file(apart).unlink()
    with pytest.raises(ArtifactError, match="its weights are not there"):
        build(apart, tmp_path / "m.engine", "tensorrt_rtx", gpus=["8.9"])
    assert left(tmp_path) == set()


def test_without_the_package_it_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "tensorrt", "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cm-runtime\[tensorrt\]'"):
        build(small, small.with_suffix(".engine"), "tensorrt")


# Whole or not at all


def test_an_engine_is_replaced_only_by_force(small: Path, no_gpu: None, tmp_path: Path) -> None:
    path = tmp_path / "small.engine"
    first = build(small, path, "tensorrt_rtx", profile=BATCH, gpus=["8.9"])
    engine_file.layers_path(path).write_text("of an older build")
    before = {name: (tmp_path / name).read_bytes() for name in left(tmp_path)}
    with pytest.raises(OutputError, match="exists; replace it with --force"):
        build(small, path, "tensorrt_rtx", profile=BATCH, gpus=["12.0"])
    assert {name: (tmp_path / name).read_bytes() for name in left(tmp_path)} == before
    second = build(small, path, "tensorrt_rtx", profile=BATCH, gpus=["12.0"], force=True)
    assert (first.gpus, second.gpus) == (("8.9",), ("12.0",))
    assert read_engine_manifest(path) == second
    assert read_engine(path, second, "tensorrt_rtx", trt.__version__, "12.0") == path.read_bytes()
    assert left(tmp_path) == {"small.engine", "small.engine.json", "small.engine.log"}


@pytest.mark.parametrize("ending", [".json", ".layers.json"])
def test_what_lies_beside_is_replaced_only_by_force(small: Path, no_gpu: None, tmp_path: Path, ending: str) -> None:
    path = tmp_path / "small.engine"
    path.with_name(path.name + ending).write_text("another's")
    with pytest.raises(OutputError, match=rf"small\.engine{ending} exists"):
        build(small, path, "tensorrt_rtx", gpus=["8.9"])
    assert left(tmp_path) == {f"small.engine{ending}"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_write_that_fails_leaves_nothing_of_the_engine(
    small: Path, no_gpu: None, tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is in place before the engine, and gone again if the engine cannot be."""
    placed = []
    real = atomic.place

    def place(temporary: Path, path: Path, *, force: bool = True) -> None:
        if path.suffix != ".log":
            placed.append(path.name)
            if len(placed) == failing:
                raise OSError(28, "No space left on device")
        real(temporary, path, force=force)

    monkeypatch.setattr(atomic, "place", place)
    with pytest.raises(OutputError, match="No space left on device"):
        build(small, tmp_path / "small.engine", "tensorrt_rtx", gpus=["8.9"])
    assert placed == ["small.engine.json", "small.engine"][:failing]
    assert left(tmp_path) == {"small.engine.log"}


# On a stand-in for a GPU: the engine is opened, compared and described


@pytest.fixture
def on_gpu(small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in_gpu.TensorRt]:
    """The builder is real; the runtime is a stand-in that runs the graph of ``small``."""
    with stand_in_gpu.installed(stand_in_gpu.Gpu()) as gpu:
        made = stand_in_gpu.TensorRt(gpu, small)
        monkeypatch.setattr(stand_in_gpu, "VERSION", trt.__version__)
        for place in ("cm_runtime.export.to_tensorrt.module", "cm_runtime.backends.tensorrt.module"):
            monkeypatch.setattr(place, lambda package: made)
        yield made


def test_with_a_gpu_parity_is_measured_and_layers_are_written(
    on_gpu: stand_in_gpu.TensorRt, small: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.engine"
    manifest = build(small, path, "tensorrt_rtx", profile=BATCH)
    assert manifest == read_engine_manifest(path)
    assert (manifest.gpus, manifest.gpu_name) == (("8.9",), "Stand-in 4090")
    assert on_gpu.opened == [path.read_bytes()]
    assert engine_file.layers_path(path).read_text() == '{"Layers": ["JSON"]}'
    parity = manifest.parity
    assert isinstance(parity, Parity)
    assert (parity.max_abs, parity.batches, set(parity.psnr)) == (0.0, (1, 7), {200.0})
    assert (len(parity.sigmas), parity.sigmas[0], parity.sigmas[-1]) == (7, 0.002, 80.0)
    assert [line for line in on_gpu.gpu.log if line.startswith("run")] == ["run 1"] * 7 + ["run 7"]
    backend = TensorRtBackend(path)
    assert np.array_equal(backend.denoise(np.ones((2, 3, 4, 4)), 2.0), np.full((2, 3, 4, 4), 2, np.float32))


def test_batches_stay_within_a_small_profile(on_gpu: stand_in_gpu.TensorRt, small: Path, tmp_path: Path) -> None:
    manifest = build(small, tmp_path / "small.engine", "tensorrt_rtx", profile=parse_profiles("2:2:3"))
    assert manifest.parity is not None
    assert manifest.parity.batches == (1, 3)
    assert {line for line in on_gpu.gpu.log if line.startswith("run")} == {"run 2", "run 3"}


@pytest.mark.parametrize(
    ("precision", "error", "passes"),
    [
        ("fp32", 9e-5, True),
        ("fp32", 1.2e-4, False),
        ("fp32", float("nan"), False),
        ("fp16", 0.019, True),  # 40 dB is a hundredth of the range of 2, root mean square
        ("fp16", 0.021, False),
        ("bf16", 0.021, False),
        ("bf16", float("nan"), False),
    ],
)
def test_an_engine_that_is_too_far_off_is_not_written(
    on_gpu: stand_in_gpu.TensorRt, tmp_path: Path, precision: str, error: float, passes: bool
) -> None:
    source = on_gpu.onnx = graph(tmp_path / "g.onnx", "Div", precision=precision)
    on_gpu.error = error
    if passes:
        parity = build(source, tmp_path / "g.engine", "tensorrt_rtx", profile=BATCH).parity
        assert parity is not None
        assert 0.9 * error < parity.max_abs < 1.1 * error
        assert np.allclose(parity.psnr, 20 * np.log10(2 / error), atol=0.5)
        return
    with pytest.raises(ParityError, match="nothing was written") as caught:
        build(source, tmp_path / "g.engine", "tensorrt_rtx", profile=BATCH)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == {"g.engine.log"}


@pytest.mark.parametrize(("error", "passes"), [(0, True), (1, True), (2, False)])
def test_a_sampler_may_be_one_grey_level_off(
    on_gpu: stand_in_gpu.TensorRt, tmp_path: Path, error: int, passes: bool
) -> None:
    source = on_gpu.onnx = sampler(tmp_path / "s.onnx")
    on_gpu.error = error
    if passes:
        parity = build(source, tmp_path / "s.engine", "tensorrt_rtx", profile=BATCH).parity
        assert parity is not None
        assert (parity.max_abs, parity.sigmas) == (pytest.approx(error * 2 / 255, rel=1e-6), (80.0, 2.5))
        return
    with pytest.raises(ParityError):
        build(source, tmp_path / "s.engine", "tensorrt_rtx", profile=BATCH)


def test_an_engine_for_other_gpus_than_this_one_is_not_opened(
    on_gpu: stand_in_gpu.TensorRt, small: Path, tmp_path: Path
) -> None:
    manifest = build(small, tmp_path / "small.engine", "tensorrt_rtx", profile=BATCH, gpus=["12.0"])
    assert (manifest.parity, manifest.gpu_name, on_gpu.opened) == (None, "", [])
    assert not engine_file.layers_path(tmp_path / "small.engine").exists()


def test_profiles_are_those_of_the_builder(small: Path, no_gpu: None) -> None:
    """Every input's N, wherever it stands, is the profile's."""
    compiler = compiler_of()
    builder = trt.Builder(compiler.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.add_input("noise", trt.float32, (2, -1, 3, 8, 8))
    network.add_input("label", trt.int64, (-1,))
    shapes = compiler._profile(builder, network, Profile(min=2, opt=5, max=9))
    assert [tuple(shape) for shape in shapes.get_shape("noise")] == [(2, n, 3, 8, 8) for n in (2, 5, 9)]
    assert [tuple(shape) for shape in shapes.get_shape("label")] == [(2,), (5,), (9,)]
