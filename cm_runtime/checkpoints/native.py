"""Our ``.pt`` checkpoints: plain tensors and containers, read without ever unpickling code.

{format, config, default_ema, ema: {rate: state_dict}, training, sigmas (where levels are known)}

Others' checkpoints are read by their own modules; how any file of tensors is read safely is here too.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cm_runtime.errors import CheckpointError, RequestError
from cm_runtime.errors.reasons import first_line, system_reason
from cm_runtime.extras import require
from cm_runtime.files import atomic, pickles, streams
from cm_runtime.files.pickles import Allowance, RefusedError, check_pickle
from cm_runtime.files.records import explain
from cm_runtime.manifest import Manifest, TrainingSummary
from cm_runtime.networks.consistency import ConsistencyModel, ModelConfig, build
from cm_runtime.networks.unet import UNetConfig

FORMAT = "cm-runtime checkpoint 1"
LEGACY_PICKLES = 5  # magic number, version, machine, content, names of storages; the numbers follow
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model: its config and the averaged weights, one state dict per EMA rate.

    Weights may be stored in float16; they are always computed in float32. sigmas: noise levels found to be best, by
    the number of steps.
    """

    config: ModelConfig
    default_ema: str
    ema: Mapping[str, Mapping[str, Tensor]]
    training: TrainingSummary
    sha256: str = ""
    sigmas: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The images and the number of weights, without them."""
        weights = sum(tensor.numel() for tensor in self.ema.get(self.default_ema, {}).values())
        rates = ", ".join(self.ema)
        return f"<Checkpoint: {self.manifest().images}, {weights:,} weights, EMA {rates}, {self.training.method}>"

    def model(self, ema: str | None = None) -> ConsistencyModel:
        """f in float32, in evaluation mode, with the weights of that EMA rate (default: default_ema).

        Raises RequestError for a rate it does not hold and CheckpointError when the tensors do not fit.
        """
        rate = ema or self.default_ema
        if rate not in self.ema:
            raise RequestError(f"there is no EMA rate {rate}; the checkpoint holds {', '.join(self.ema)}")
        model = build(self.config, "meta")
        weights = {name: tensor.detach().float() for name, tensor in self.ema[rate].items()}
        check_weights(model, weights)
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    def manifest(self) -> Manifest:
        """Manifest of an export of this checkpoint, without parity."""
        config = self.config
        return Manifest(
            graph="denoiser",
            image_shape=config.image_shape,
            num_classes=config.network.num_classes,
            precond=config.precond,
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            sigma_data=config.sigma_data,
            sigma_boundary=config.sigma_boundary,
            rho=config.rho,
            sigmas=dict(self.sigmas),
            source_sha256=self.sha256,
            training=self.training,
        )


def save_checkpoint(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Writes ``path`` whole or not at all; raises OutputError."""
    save_plain(
        {
            "format": FORMAT,
            "config": checkpoint.config.model_dump(mode="json"),
            "default_ema": checkpoint.default_ema,
            "ema": {rate: dict(weights) for rate, weights in checkpoint.ema.items()},
            "training": checkpoint.training.model_dump(mode="json"),
            **(
                {"sigmas": {steps: list(levels) for steps, levels in checkpoint.sigmas.items()}}
                if checkpoint.sigmas
                else {}
            ),
        },
        path,
    )


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Our checkpoint in ``path``. Raises CheckpointError: missing, truncated, a pickle, not ours, misshapen."""
    return parse_checkpoint(load_plain(path), path)


def parse_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint in what was read from ``path``. Raises CheckpointError."""
    where = Path(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{where} is not a cm-runtime checkpoint")
    try:
        checkpoint = Checkpoint(
            config=ModelConfig.model_validate(content["config"]),
            default_ema=content["default_ema"],
            ema=content["ema"],
            training=TrainingSummary.model_validate(content["training"]),
            sha256=atomic.sha256(where),
            sigmas=content.get("sigmas", {}),
        )
        checkpoint.manifest()  # its checks are those of the levels
    except KeyError as error:
        raise CheckpointError(f"{where} is damaged: it has no {error}") from error
    except ValidationError as error:
        raise CheckpointError(f"{where} is damaged: {explain(error, 'config')}") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged: sigmas: they are not levels by the number of steps") from error
    if not isinstance(checkpoint.ema, Mapping) or not all(isinstance(rate, str) for rate in checkpoint.ema):
        raise CheckpointError(f"{where} is damaged: it has no weights by EMA rate")
    if not isinstance(checkpoint.default_ema, str) or checkpoint.default_ema not in checkpoint.ema:
        raise CheckpointError(f"{where} is damaged: it has no weights for EMA rate {str(checkpoint.default_ema)[:99]}")
    try:
        for weights in checkpoint.ema.values():
            check_weights(build(checkpoint.config, "meta"), weights)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return checkpoint


def save_plain(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Plain tensors and containers to ``path``, whole or not at all; raises OutputError."""
    with atomic.write(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(dict(content), file)  # an open file: torch would store a path's name, and so change the hash
        except RuntimeError as error:  # torch's zip writer, after the disk's own error
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from error


def load_plain(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of `save_plain`; raises CheckpointError."""
    content = load_torch(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a cm-runtime checkpoint: it holds a {type(content).__name__}")
    return content


def load_torch(path: str | os.PathLike[str]) -> Any:
    """Read a file of ``torch.save``, tensors on the CPU; nothing is unpickled but tensors and plain containers.

    Files of before 2017 (a tar) are not read. Those of before 2020, three pickles and then the bytes of each tensor, go
    through the same restricted unpickler as zips do, and get memory for no more bytes than the file holds. Raises
    CheckpointError.
    """
    where = Path(path)
    start = b""
    try:
        with warnings.catch_warnings(), streams.open_file(where, CheckpointError) as file:
            warnings.simplefilter("ignore")  # torch remarks on pickles of other versions; the error says enough
            start = file.read(2)
            if start == b"PK":
                _check_archive(where, os.fstat(file.fileno()).st_size)
                return torch.load(where, map_location="cpu", weights_only=True)
            # Mapped, and so no file to torch, which would look for a tar in one.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                head, allowance = io.BytesIO(content[: pickles.MOST_BYTES]), Allowance(len(content))
                for _ in range(LEGACY_PICKLES):
                    check_pickle(head, allowance)
                return torch.load(cast(IO[bytes], content), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except RefusedError as error:
        raise CheckpointError(f"{where} is not a torch checkpoint, or is damaged: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way: IndexError, struct.error, AssertionError, ...
        if isinstance(error, pickle.UnpicklingError) and (start == b"PK" or start[:1] == pickle.PROTO):
            raise CheckpointError(
                f"{where} is a pickle that could run code, which cm-runtime never does; save plain tensors"
            ) from error
        raise CheckpointError(f"{where} is not a torch checkpoint, or is damaged") from error


def _check_archive(path: Path, size: int) -> None:
    """Check a zip of torch's, and the pickle in it, before anything is built. Raises as `check_pickle`."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size_of_content = sum(entry.file_size for entry in entries)
    if size_of_content > size:  # torch stores without compression: anything else is a bomb
        raise CheckpointError(f"{path} is not a torch checkpoint: it claims {size_of_content} bytes of content")
    if any(entry.file_size > pickles.MOST_BYTES for entry in entries if entry.filename.endswith("data.pkl")):
        raise RefusedError(f"its pickle has over {pickles.MOST_BYTES} bytes")
    record = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")  # the one that torch.load reads
    check_pickle(io.BytesIO(record), Allowance(size))


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, which holds nothing else; raises CheckpointError."""
    require("safetensors", f"reading {path}")
    from safetensors.torch import load_file

    streams.regular(path, CheckpointError)
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {system_reason(error)}") from error
    except Exception as error:  # the package's own error derives from nothing narrower
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged") from error


def build_network(**options: Any) -> UNetConfig:
    """Build the config of a network read off another tool's file; raises CheckpointError naming the first fault."""
    try:
        return UNetConfig(**options)
    except ValidationError as error:
        raise CheckpointError(f"no network of ours: {explain(error)}") from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a module's state dict, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_weights(model: ConsistencyModel, weights: Any) -> None:
    """Raises CheckpointError where ``weights`` are not those of ``model``."""
    check_tensors(shapes_of(model), weights, "its tensors do not fit its config")


def is_dense(tensor: Tensor) -> bool:
    """True for a tensor of floats that has memory of its own for each of them."""
    if tensor.dtype not in STORED or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def check_tensors(shapes: Mapping[str, tuple[int, ...]], weights: Any, complaint: str) -> None:
    """Raises CheckpointError naming the tensors that are missing, extra, misshapen or not finite, the first five."""
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise CheckpointError("its weights are not a state dict")
    wrong = [f"missing {name}" for name in shapes if name not in weights]
    wrong += [f"unexpected {name}" for name in weights if name not in shapes]
    for name, tensor in weights.items():
        if name not in shapes:
            continue
        if tuple(tensor.shape) != shapes[name]:
            wrong.append(f"{name} is {tuple(tensor.shape)} and should be {shapes[name]}")
        elif not is_dense(tensor):
            wrong.append(f"{name} is not a dense tensor of floats")
        elif not bool(torch.isfinite(tensor).all()):
            wrong.append(f"{name} is not finite")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(f"{complaint}: " + "; ".join(wrong[:5]) + more)
