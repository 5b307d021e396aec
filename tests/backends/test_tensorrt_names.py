"""Every name of TensorRT's that our code uses is one that TensorRT has, in each release that we claim to run on.

No machine of ours runs `tensorrt` itself, so a misspelt name there would be found by a user. What two releases offer is
written down in tensorrt_names/ (its extract.py says how); `tensorrt_rtx` is installed and asked itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTS = sorted((Path(__file__).parent / "tensorrt_names").glob("*.txt"))

# What each variable of these files is; the rest of their attributes are ours or NumPy's.
BUILDER = {
    "trt": "tensorrt",
    "self.trt": "tensorrt",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "wrong": "ParserError",
    "config": "IBuilderConfig",
    "shapes": "IOptimizationProfile",
    "tensor": "ITensor",
    "layer": "ILayer",
    "serialized": "IHostMemory",
    "timings": "ITimingCache",
}
RUNTIME = {
    "trt": "tensorrt",
    "self._trt": "tensorrt",
    "self._runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "inspector": "EngineInspector",
}
CONTEXTS = {
    "trt": "tensorrt",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "config": "IRuntimeConfig",
    "self._config": "IRuntimeConfig",
    "context": "IExecutionContext",
    "bound.context": "IExecutionContext",
    "cache": "IRuntimeCache",
    "self._cache": "IRuntimeCache",
}
LOG = {
    "trt": "tensorrt",
    "base": "ILogger",
    "base.Severity": "ILogger.Severity",
    "severity": "ILogger.Severity",
}
PLUGIN = {
    "trtp": "plugin",
    "x": "plugin.TensorDesc",
    "F": "plugin.TensorDesc",
    "F.dtype": "DataType",
    "sigma": "plugin.TensorDesc",
    "launch": "plugin.KernelLaunchParams",
    "extras": "plugin.SymIntExprs",
}
FILES = {
    "export/to_tensorrt.py": BUILDER,
    "cm_runtime/backends/tensorrt.py": RUNTIME,
    "cm_runtime/backends/tensorrt_contexts.py": CONTEXTS,
    "cm_runtime/backends/tensorrt_log.py": LOG,
    "export/tensorrt_plugin.py": PLUGIN,
}
# `plugin.register` of ours builds for `tensorrt` alone, and the targets that need no GPU are of `tensorrt_rtx` alone.
RTX_ONLY = {
    "tensorrt.ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
    "IExecutionContext.is_stream_capturable",
    "tensorrt.DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
}
FULL_ONLY = {"NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS"}


def used(source: str, variables: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name, as ``IBuilderConfig.clear_flag``, of each attribute of one of ``variables``."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = variables.get(ast.unparse(node.value)) or nested(node.value, variables)
        if owner and not node.attr.startswith("_"):
            yield node.lineno, f"{owner}.{node.attr}"


def nested(node: ast.expr, variables: dict[str, str]) -> str | None:
    """The class that an expression like ``trt.ILogger.Severity`` stands for, or None."""
    if not isinstance(node, ast.Attribute):
        return None
    owner = variables.get(ast.unparse(node.value)) or nested(node.value, variables)
    if owner == "tensorrt":
        return node.attr
    return f"{owner}.{node.attr}" if owner == "ILogger" else None


def untracked(source: str, variables: dict[str, str]) -> list[str]:
    """Variables that are given what a TensorRT object returned and are not in ``variables``: names would escape."""
    lost = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        called = node.value.func
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) in variables:
            for target in node.targets:
                holder = target.value if isinstance(target, ast.Attribute | ast.Subscript) else target
                if not {ast.unparse(target), ast.unparse(holder)} & set(variables):
                    lost.append(f"{node.lineno}: {ast.unparse(target)}")
    return lost


def known(text: str) -> set[str]:
    """All dotted names of a list."""
    names = set()
    for line in text.splitlines():
        owner, _, members = line.partition(": ")
        names |= {f"{owner}.{member}" for member in members.split()}
    return names


def unknown(source: str, variables: dict[str, str], offered: set[str]) -> list[str]:
    """A line for each name that ``offered`` lacks."""
    wrong = {(line, name) for line, name in used(source, variables) if name not in offered | RTX_ONLY}
    return [f"{line}: {name}" for line, name in sorted(wrong) if not name.startswith("ComputeCapability.")]


def test_two_major_versions_are_written_down() -> None:
    assert {path.name.split(".")[0] for path in LISTS} == {"10", "11"}
    assert all({"Builder.create_network", "plugin.aot_impl"} < known(path.read_text()) for path in LISTS)


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("file", FILES)
def test_what_we_use_is_in_every_release(file: str, path: Path) -> None:
    source = (ROOT / file).read_text()
    assert len(set(used(source, FILES[file]))) >= 5
    assert unknown(source, FILES[file], known(path.read_text())) == []


@pytest.mark.parametrize("file", FILES)
def test_no_object_of_theirs_is_in_a_variable_that_is_not_watched(file: str) -> None:
    assert untracked((ROOT / file).read_text(), FILES[file]) == []
    assert untracked("timer = config.get_timing_cache()", BUILDER) == ["1: timer"]


@pytest.mark.parametrize(
    ("file", "ours", "misspelt", "found"),
    [
        ("export/to_tensorrt.py", "trt.BuilderFlag.TF32", "trt.BuilderFlag.FP23", "BuilderFlag.FP23"),
        ("export/to_tensorrt.py", "trt.OnnxParser", "trt.OnnxReader", "tensorrt.OnnxReader"),
        ("export/to_tensorrt.py", "parser.num_errors", "parser.number_of_errors", "OnnxParser.number_of_errors"),
        ("export/to_tensorrt.py", "wrong.node_name()", "wrong.node_title()", "ParserError.node_title"),
        ("export/to_tensorrt.py", "builder.create_builder_config", "builder.create_config", "Builder.create_config"),
        ("cm_runtime/backends/tensorrt_contexts.py", "set_tensor_address", "set_tensor_adress", "set_tensor_adress"),
        ("cm_runtime/backends/tensorrt_log.py", "base.Severity.VERBOSE", "base.Severity.LOUD", "ILogger.Severity.LOUD"),
        ("cm_runtime/backends/tensorrt_contexts.py", "execute_async_v3", "execute_async_v2", "execute_async_v2"),
        ("export/tensorrt_plugin.py", "trtp.cdiv", "trtp.ceil_div", "plugin.ceil_div"),
        ("export/tensorrt_plugin.py", "launch.grid_y", "launch.grid_Y", "plugin.KernelLaunchParams.grid_Y"),
        ("export/tensorrt_plugin.py", "x.shape_expr", "x.shape_exprs", "plugin.TensorDesc.shape_exprs"),
    ],
)
def test_a_misspelt_name_is_found(file: str, ours: str, misspelt: str, found: str) -> None:
    source = (ROOT / file).read_text()
    assert ours in source
    for path in LISTS:
        lines = unknown(source.replace(ours, misspelt), FILES[file], known(path.read_text()))
        assert lines
        assert all(line.endswith(found) for line in lines)


@pytest.mark.parametrize("file", [file for file in FILES if "plugin" not in file])
def test_tensorrt_rtx_has_them_too(file: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for line, name in used((ROOT / file).read_text(), FILES[file]):
        if name in FULL_ONLY:
            continue
        found = trt
        for part in name.removeprefix("tensorrt.").split("."):
            assert hasattr(found, part), f"{file}:{line}: tensorrt_rtx has no {name}"
            found = getattr(found, part)
