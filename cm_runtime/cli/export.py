"""``cm-runtime export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cm_runtime.choices import Form, GraphKind, Precision, Target
from cm_runtime.cli import progress
from cm_runtime.cli.options import Force, Sigmas, with_flags
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.checkpoints.native import Checkpoint
    from cm_runtime.export.speed import Comparison
    from cm_runtime.export.to_onnx import OnnxExport

Format = Literal["onnx", "tensorrt", "tensorrt-rtx", "diffusers"]


@dataclass(frozen=True)
class SourceFlags:
    """Options of a checkpoint that does not say all of itself."""

    precond: Annotated[
        Form | None,
        typer.Option(help="The preconditioning form, of files that do not say it."),
    ] = None
    head_channels: Annotated[
        int | None, typer.Option(help="Channels of an attention head, of OpenAI's files.", show_default="64")
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels a side, of OpenAI's files.", show_default="innermost feature map 8x8, as they have"),
    ] = None
    model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The published model that this is, as cd_imagenet64_l2.", show_default="the file's"
        ),
    ] = None

    def load(self, path: Path) -> Checkpoint:
        """Read the checkpoint."""
        from cm_runtime.checkpoints.load import load_checkpoint

        with progress.spinner(f"reading {path}"):
            return load_checkpoint(path, **vars(self))


@dataclass(frozen=True)
class FileFlags:
    """Options of the file to write; `check` raises RequestError for those that its form or graph has no use for."""

    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="A graph for engines; a TensorRT engine: tensorrt for the GPU here, tensorrt-rtx for any RTX GPU,"
            " built on any machine; or a folder that diffusers' ConsistencyModelPipeline opens.",
        ),
    ] = "onnx"
    graph: Annotated[
        GraphKind,
        typer.Option(help="f at any noise level; a whole sampler at fixed ones, the fastest; or F alone, for a GPU."),
    ] = "denoiser"
    steps: Annotated[int | None, typer.Option(help="Of --graph sampler: evaluations an image.", show_default="2")] = (
        None
    )
    sigmas: Sigmas = None
    precision: Annotated[
        Precision,
        typer.Option(help="Of weights and feature maps; what must be float32 stays so."),
    ] = "fp32"
    target: Annotated[
        Target,
        typer.Option(
            "--for",
            help="Whose operators: cpu, the standard's, which every engine runs, on a GPU too; cuda, ONNX Runtime's own"
            " on a GPU: images in NHWC, normalisation with SiLU and attention each in one; tensorrt, the standard's in"
            " the forms that it fuses, as in its engines.",
        ),
    ] = "cpu"
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="1,8,64:64:256",
            help="Batches that a TensorRT engine takes, each with kernels of its own: N, or MIN:OPT:MAX, best at OPT.",
            show_default="1 to what a GPU sees at once",
        ),
    ] = None
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="8.9,12.0", help="Compute capabilities to build for, of tensorrt-rtx.", show_default="the GPU here"
        ),
    ] = None
    optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0, max=5, help="Of TensorRT's builder: lower builds faster, for slower engines.", show_default="5"
        ),
    ] = None
    inline: Annotated[
        bool, typer.Option("--inline", help="Skip-scale as standard ops, for engines without local functions.")
    ] = False

    def check(self) -> None:
        """Raise RequestError for an option that this form or graph has no use for."""
        form, is_sampler = self.form, self.graph == "sampler"
        if form == "diffusers" and (self.graph != "denoiser" or self.precision != "fp32" or self.inline):
            raise RequestError("--graph, --precision and --inline are of graphs for engines, not of --format diffusers")
        if form != "onnx" and self.target != "cpu":
            raise RequestError("--for is of --format onnx; other formats have operators of their own")
        if not is_sampler and (self.steps is not None or self.sigmas is not None):
            raise RequestError("--steps and --sigmas are of --graph sampler; other graphs take any noise level")
        if self.batch is not None and form not in ("tensorrt", "tensorrt-rtx"):
            raise RequestError("--batch is of --format tensorrt and tensorrt-rtx; an .onnx takes any batch")
        if self.optimization_level is not None and form != "tensorrt":
            raise RequestError("--optimization-level is of --format tensorrt; the others have none")
        if self.gpu is not None and form != "tensorrt-rtx":
            raise RequestError("--gpu is of --format tensorrt-rtx")

    def write(self, checkpoint: Checkpoint, path: Path, *, force: bool) -> OnnxExport:
        """Write the ``.onnx``."""
        from cm_runtime import export as exporting
        from cm_runtime.cli import parsing

        with progress.spinner("building the graph, and proving it equal to the torch model"):
            return exporting.onnx(
                checkpoint,
                path,
                graph=self.graph,
                steps=self.steps,
                sigmas=parsing.numbers("--sigmas", self.sigmas) if self.sigmas else None,
                precision=self.precision,
                inline=self.inline,
                target=self.target if self.form == "onnx" else "tensorrt",
                force=force,
            )


@with_flags()
def export(
    flags: FileFlags,
    source: SourceFlags,
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="A checkpoint of cm-runtime train or OpenAI's, or a diffusers folder."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The .onnx or .engine file, or diffusers' folder.",
            show_default="the checkpoint's name",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare/--no-compare", help="Time the .onnx against a plain torch.onnx.export, which is made for it."
        ),
    ] = False,
    force: Force = False,
) -> None:
    """Export a checkpoint for an engine, with the skip-scaling in the graph, proved equal to the torch model.

    Example: cm-runtime export runs/fashion-mnist/ckpt.pt --graph sampler --steps 2 -o sampler.onnx
    """
    flags.check()
    from cm_runtime.extras import require

    for package in ("torch", "onnx", *["onnxscript"] * (compare and flags.form == "onnx")):
        require(package, "cm-runtime export")
    from cm_runtime import export as exporting
    from cm_runtime.files import atomic
    from cm_runtime.files.streams import exists

    name = checkpoint.absolute()  # "." has none of its own
    if flags.form == "diffusers":
        target = output or name.with_suffix("")
        if target.absolute() == name:
            raise RequestError(f"{checkpoint} is where the folder would go by default; give another with -o")
        whole = source.load(checkpoint)
        with progress.spinner(f"writing {target}"):
            exporting.diffusers(whole, target, force=force)
        typer.echo(f"{target}: now ConsistencyModelPipeline.from_pretrained({str(target)!r})")
        return
    suffix = ".onnx" if flags.form == "onnx" else ".engine"
    target = output or (checkpoint if checkpoint.name else name).with_suffix(suffix)
    if exists(checkpoint):
        atomic.check_output(target, force=force)  # before minutes of reading
    if flags.form != "onnx":
        _build_engine(source.load(checkpoint), flags, target, force=force)
        return
    result = flags.write(source.load(checkpoint), target, force=force)
    comparison = None
    if compare:
        from cm_runtime.export.speed import with_plain

        whole = source.load(checkpoint)
        with progress.spinner("timing it against a plain export"):
            comparison = with_plain(whole, target, result.manifest)
    _summarise(target, result, comparison)


def _build_engine(checkpoint: Checkpoint, flags: FileFlags, target: Path, *, force: bool) -> None:
    """Write the graph in a temporary folder, and the engine that TensorRT makes of it."""
    from cm_runtime import export as exporting
    from cm_runtime.backends.batch_profiles import format_profiles, parse_profiles
    from cm_runtime.backends.engine_file import log_path
    from cm_runtime.files.workspaces import scratch

    profiles = parse_profiles(flags.batch) if flags.batch else ()
    with scratch("cm-export") as folder:
        path = folder / "graph.onnx"
        flags.write(checkpoint, path, force=False)
        del checkpoint
        with progress.spinner("building the engine"):
            manifest = exporting.tensorrt(
                path,
                target,
                package="tensorrt" if flags.form == "tensorrt" else "tensorrt_rtx",
                batches=[(profile.min, profile.opt, profile.max) for profile in profiles],
                gpus=flags.gpu.split(",") if flags.gpu else (),
                optimization_level=flags.optimization_level,
                force=force,
            )
    model, parity = manifest.model, manifest.parity
    proof = f"within {parity.max_abs:.1e} of ONNX Runtime" if parity else "not compared: no GPU here can open it"
    batches = format_profiles(manifest.profiles)
    typer.echo(
        f"{target}: {manifest.bytes / 1e6:.1f} MB, {model.graph} in {model.precision} for compute capability"
        f" {', '.join(manifest.gpus)}, batches {batches}; its graph is proved, the engine {proof}"
    )
    typer.echo(f"  what TensorRT said is in {log_path(target)}")


def _summarise(target: Path, result: OnnxExport, plain: Comparison | None) -> None:
    from cm_runtime.errors.wording import quantity
    from cm_runtime.schedule import level_text

    manifest, parity = result.manifest, result.manifest.parity
    assert parity is not None  # no file is written without its proof
    levels_text = ""
    if manifest.graph == "sampler":
        levels_text = f", {quantity(manifest.steps, 'step')} at {level_text(parity.sigmas)}"
    data = f", weights in {manifest.data_file}" if manifest.data_file else ""
    form = "" if manifest.target == "cpu" else f" for {manifest.target}"
    typer.echo(f"{target}: {manifest.graph}{levels_text}, {manifest.precision}{form}{data}")
    times = manifest.steps if manifest.graph == "sampler" else 1
    beside = f" ({plain.nodes * times} in a plain export)" if plain else ""
    typer.echo(f"  nodes    {result.nodes}{beside}; {quantity(result.folds, 'constant')} folded")
    beside = f" ({plain.bytes / 1e6:.1f} MB plain)" if plain else ""
    typer.echo(f"  size     {result.bytes / 1e6:.1f} MB{beside}")
    typer.echo(f"  parity   within {parity.max_abs:.1e} of torch in float32 ({parity.engine}); PSNR in dB:")
    levels = parity.sigmas if len(parity.psnr) > 1 else ("images",)
    ratios = (f"{s if isinstance(s, str) else f'{s:g}'}: {psnr:g}" for s, psnr in zip(levels, parity.psnr, strict=True))
    typer.echo(f"           {', '.join(ratios)}")
    if plain:
        beside = f"batch {plain.batch} ({plain.engine})"
        typer.echo(f"  speed    a plain export takes {plain.text}, {beside}")
    device = " --device cuda:0" if manifest.target == "cuda" else ""
    typer.echo(f"  now      cm-runtime sample {target}{device}")
