"""Writes down what TensorRT's Python package offers, from a wheel of its bindings alone: no library, no GPU.

    pip download --no-deps tensorrt_cu13_bindings==10.16.1.11
    python tests/backends/tensorrt_names/extract.py tensorrt_cu13_bindings-10.16.1.11-*.whl

writes 10.16.1.11.txt beside this file, a line for each class. The bindings need nothing of TensorRT's libraries to be
imported but nine functions, which stand-ins with the libraries' names provide; what the module then holds is the real
thing. So is `tensorrt.plugin`, which is plain Python: it must accept our plugin.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
CLASSES = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "LayerType",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorFormat",
    "TensorIOMode",
]


def load(wheel: Path, folder: Path) -> ModuleType:
    """The package `tensorrt` of a wheel of bindings, on stand-ins for its libraries."""
    zipfile.ZipFile(wheel).extractall(folder)
    (folder / "tensorrt_bindings").rename(folder / "tensorrt")
    extension = folder / "tensorrt" / "tensorrt.so"
    needed = re.findall(r"\[(libnv\S+)\]", output("readelf", "-d", extension))
    symbols = [line.split() for line in output("nm", "-D", "--undefined-only", extension).splitlines()]
    functions = [
        name for kind, name in symbols if kind == "U" and "@" not in name and not name.startswith(("Py", "_Py"))
    ]
    source = folder / "stand_in.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in functions))
    for name in needed:
        output("cc", "-shared", "-fPIC", "-o", folder / name, source, f"-Wl,-soname,{name}")
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    import tensorrt

    return tensorrt


def output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def names(trt: ModuleType, trtp: ModuleType) -> dict[str, set[str]]:
    """Class -> members, of the classes that an adapter may use; "tensorrt" and "plugin" are the modules themselves."""
    found = {"tensorrt": public(trt), "plugin": set(trtp.__all__)}
    for name in CLASSES:
        found[name] = public(getattr(trt, name))
    found["ILogger.Severity"] = public(trt.ILogger.Severity)
    for name in trtp.__all__:
        if inspect.isclass(made := getattr(trtp, name)):
            own = re.findall(r"self\.([a-z]\w*)|\"((?:grid|block)_[xyz])\"", inspect.getsource(made))
            found[f"plugin.{name}"] = public(made) | {one or other for one, other in own}
    return found


def public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def check_plugin(trtp: ModuleType) -> None:
    """Ends in an exception if this version does not accept our plugin's functions."""
    sys.path.insert(0, str(HERE.parents[2]))
    from cm_runtime.export import tensorrt_plugin

    trtp._lib._register_plugin_creator = lambda *_: None  # the one step that asks the library
    tensorrt_plugin.register(trtp)
    made = trtp._lib.QDP_REGISTRY["cm::SkipScale"]
    assert made.input_tensor_names == ["x", "F", "sigma"]
    assert made.aot_impl_attr_names == ["sigma_data", "sigma_boundary"]


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trt = load(wheel, Path(folder))
        import tensorrt.plugin as trtp

        check_plugin(trtp)
        lines = [f"{name}: {' '.join(sorted(members))}\n" for name, members in sorted(names(trt, trtp).items())]
    (HERE / f"{trt.__version__}.txt").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
