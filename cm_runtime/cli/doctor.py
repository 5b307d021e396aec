"""``cm-runtime doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# What each optional package is for; all that `extras.EXTRAS` names.
PURPOSES = {
    "to sample": ("numpy", "onnxruntime"),
    "faster on a CPU": ("openvino",),
    "on an NVIDIA GPU": ("cuda.bindings",),
    "in pycuda's contexts": ("pycuda",),
    "engines for a GPU": ("tensorrt", "tensorrt_rtx"),
    "to train and export": ("torch", "onnx", "onnxscript", "pooch", "safetensors", "tensorboard", "tomli_w"),
    "to benchmark and report": ("diffusers", "jinja2", "matplotlib"),
    "shards for data sets": ("pyarrow",),
}
WIDTH = 16


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget which engine auto found fastest, for every file.")
    ] = False,
) -> None:
    """Say what this installation can do: packages, engines and devices, and how to get what is missing."""
    import json

    if forget:
        from cm_runtime.backends import measurements
        from cm_runtime.errors.wording import quantity

        typer.echo(f"{'auto':{WIDTH}} forgot {quantity(measurements.forget(), 'remembered choice')}")
        return
    content = _examine()
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    typer.echo(f"cm-runtime {content['cm-runtime']}, Python {content['python']}, {content['architecture']}")
    for name in ("cores", "gpu", "cuda", "auto", "precision", "model", "warning"):
        if content[name]:
            typer.echo(f"{name:{WIDTH}} {content[name]}")
    for purpose, packages in content["packages"].items():
        typer.echo(f"{purpose}:")
        for package, version in packages.items():
            typer.echo(f"  {package:{WIDTH - 2}} {version or 'missing'}")
        if install := content["install"].get(purpose):
            typer.echo(f"  {'install':{WIDTH - 2}} {install}")


def _examine() -> dict[str, Any]:
    """Everything that doctor prints, under the names of its lines."""
    import platform

    from cm_runtime import __version__
    from cm_runtime.backends import gpus
    from cm_runtime.extras import EXTRAS, has_cpu_runtime
    from cm_runtime.subprocesses import cores

    packages = {purpose: {name: _version(name) for name in names} for purpose, names in PURPOSES.items()}
    install = {}
    for purpose, versions in packages.items():
        if missing := dict.fromkeys(
            EXTRAS[name] for name, version in versions.items() if not version and name in EXTRAS
        ):
            extras_to_install = (
                [next(iter(missing))] if purpose == "engines for a GPU" else missing
            )  # either of them will do
            install[purpose] = f"pip install 'cm-runtime[{','.join(extras_to_install)}]'"
            if "gpu" in extras_to_install and has_cpu_runtime():  # the two builds are one module
                install[purpose] = f"pip uninstall -y onnxruntime && {install[purpose]}"
    if any(packages["engines for a GPU"].values()):
        install.pop("engines for a GPU", None)
    return {
        "cm-runtime": __version__,
        "python": platform.python_version(),
        "architecture": platform.machine(),
        "cores": cores(),
        "gpu": _gpu(),
        "cuda": gpus.describe(),
        **_describe_bundled(),
        "warning": gpus.warn(),
        "packages": packages,
        "install": install,
    }


def _describe_bundled() -> dict[str, str]:
    """Engine and precisions for the bundled model on this machine."""
    from cm_runtime.backends import DEFAULT_MODEL, auto, auto_device, precisions
    from cm_runtime.errors import CmRuntimeError
    from cm_runtime.manifest import read_manifest

    try:
        manifest = read_manifest(DEFAULT_MODEL)
        question = auto.question(DEFAULT_MODEL, manifest, auto_device("auto"))
        words = f"the bundled model runs on {auto.explain(question)}"
        precisions_in_words = ", ".join(f"{name}: {what}" for name, what in precisions().items())
    except CmRuntimeError as error:
        return {"auto": str(error), "precision": "", "model": ""}
    shape = "x".join(map(str, manifest.image_shape))
    return {"auto": words, "precision": precisions_in_words, "model": f"the bundled model draws {shape} images"}


def _version(package: str) -> str:
    """The installed version; empty where there is none. ONNX Runtime's is the module's own, with its providers."""
    from importlib import metadata

    from cm_runtime.extras import has, require

    names = metadata.packages_distributions().get(package.partition(".")[0])
    if not names:
        return ""
    if package != "onnxruntime" or not has(package):
        return metadata.version(names[0])
    try:
        module: Any = require(package, "doctor")
    except Exception as error:  # whatever a damaged installation raises
        return f"cannot be imported: {error}"
    providers = [name.removesuffix("ExecutionProvider") for name in module.get_available_providers()]
    return f"{module.__version__} ({', '.join(providers)})"


def _gpu() -> str:
    """The driver and its GPUs, by nvidia-smi."""
    from cm_runtime.bench.nvidia import nvidia_smi
    from cm_runtime.extras import NO_DRIVER, has_driver

    if not has_driver():
        return f"none: {NO_DRIVER}"
    rows = nvidia_smi("gpu", "name", "driver_version", "compute_cap")
    lines = [f"{name}, driver {driver}, compute capability {capability}" for name, driver, capability in rows]
    return "; ".join(lines) or "an NVIDIA driver is here, and nvidia-smi names no GPU"
