"""The twelve models that OpenAI published with consistency models, by the names of their files.

Source: https://github.com/openai/consistency_models (README.md and scripts/launch.sh).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cm_runtime.choices import Form
from cm_runtime.errors import CheckpointError, RequestError
from cm_runtime.manifest import TrainingSummary
from cm_runtime.schedule import NoiseRange

IMAGENET, BEDROOM, CAT = "ImageNet-64", "LSUN Bedroom-256", "LSUN Cat-256"


@dataclass(frozen=True)
class Published:
    """Method and data of one. N: points of its training grid; middle: the index in it of the best second step."""

    method: Literal["edm", "cd", "ct"]
    data: str
    N: int | None = None
    middle: int | None = None

    @property
    def precond(self) -> Form:
        """Teachers have the edm form, consistency models the boundary form."""
        return "edm" if self.method == "edm" else "boundary"

    @property
    def sigmas(self) -> dict[int, tuple[float, ...]]:
        """The published levels of two steps."""
        if self.N is None or self.middle is None:
            return {}
        grid = NoiseRange().karras(self.N)
        return {2: (float(grid[0]), float(grid[self.middle]))}


MODELS = {
    "edm_imagenet64_ema": Published("edm", IMAGENET),
    "cd_imagenet64_l2": Published("cd", IMAGENET, 40, 22),
    "cd_imagenet64_lpips": Published("cd", IMAGENET, 40, 22),
    "ct_imagenet64": Published("ct", IMAGENET, 201, 106),
    "edm_bedroom256_ema": Published("edm", BEDROOM),
    "cd_bedroom256_l2": Published("cd", BEDROOM, 40, 18),
    "cd_bedroom256_lpips": Published("cd", BEDROOM, 40, 17),
    "ct_bedroom256": Published("ct", BEDROOM, 151, 67),
    "edm_cat256_ema": Published("edm", CAT),
    "cd_cat256_l2": Published("cd", CAT, 40, 18),
    "cd_cat256_lpips": Published("cd", CAT, 40, 17),
    "ct_cat256": Published("ct", CAT, 151, 62),
}


def find(path: Path) -> Published | None:
    """The published model whose name the file has, or the folder, which diffusers' conversions call diffusers-NAME."""
    return MODELS.get(path.absolute().name.removeprefix("diffusers-").removesuffix(path.suffix))


def find_by_name(name: str) -> Published:
    """Find the published model of that name; raises RequestError."""
    if name not in MODELS:
        raise RequestError(f"there is no published model {name!r}; they are {', '.join(MODELS)}")
    return MODELS[name]


def form(published: Published | None, precond: Form | None) -> Form:
    """The form that a published name decides, else ``precond``; raises CheckpointError where neither does."""
    if published is not None:
        if precond not in (None, published.precond):
            raise CheckpointError(f"the published model of this name has the {published.precond} form, not {precond}")
        return published.precond
    if precond is None:
        raise CheckpointError(
            "such a file does not say its preconditioning form: export it with --precond boundary (a consistency"
            " model), --precond edm, or --model-name and the published model that it is"
        )
    return precond


def summary(published: Published | None, source: str, N: int | None = None) -> TrainingSummary:
    """Summarise the published facts of an imported model's training. N: num_train_timesteps, where the file says it."""
    if N is None and published is not None:
        N = published.N
    return TrainingSummary(
        method=published.method if published else "unknown",
        data=published.data if published else "unknown",
        config={"imported_from": source, **({"num_train_timesteps": N} if N else {})},
    )
