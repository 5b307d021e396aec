"""The batches that a TensorRT engine takes, as its optimisation profiles: each has kernels of its own.

Kernels are tuned for one size of a profile and take all of them, so that an engine is fastest with a profile for each
size that matters. `parse_profiles` reads ``1,8,64:64:256``: batches of 1, of 8, and of 64 to 256, best at 64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field, ValidationError, model_validator

from cm_runtime.errors import RequestError
from cm_runtime.files.records import Record

LARGEST_BATCH = 65535  # the kernel of cm::SkipScale has a block row for each image
MOST_PROFILES = 16
_PROFILE = re.compile(r"(\d{1,6})(?::(\d{1,6}):(\d{1,6}))?", re.ASCII)


class Profile(Record):
    """The batch sizes that an engine takes by one set of kernels, and the one it is fastest at."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(le=LARGEST_BATCH)

    @model_validator(mode="after")
    def _ascends(self) -> Profile:
        if not self.min <= self.opt <= self.max:
            raise ValueError("they must ascend")
        return self

    def __str__(self) -> str:
        return str(self.opt) if self.min == self.max else f"{self.min}:{self.opt}:{self.max}"


def parse_profiles(text: str) -> tuple[Profile, ...]:
    """Profiles as --batch has them: N or MIN:OPT:MAX, with commas between. Raises RequestError."""
    matches = [_PROFILE.fullmatch(part) for part in text.split(",")]
    try:
        if len(matches) <= MOST_PROFILES and all(matches):
            sizes = [(match[1], match[2] or match[1], match[3] or match[1]) for match in matches if match]
            return tuple(Profile(min=int(low), opt=int(best), max=int(high)) for low, best, high in sizes)
    except ValidationError:
        pass
    raise RequestError(
        f"--batch must be up to {MOST_PROFILES} of N or MIN:OPT:MAX, ascending from 1 to {LARGEST_BATCH},"
        f" as 1,8,64 or 1:64:256, not {text!r}"
    )


def format_profiles(profiles: Sequence[Profile]) -> str:
    """The text that `parse_profiles` reads."""
    return ",".join(map(str, profiles))


def choose_profile(profiles: Sequence[Profile], count: int) -> tuple[int, int]:
    """Return the number of the profile that runs ``count`` images, and the batch that they are padded to.

    It is the one that pads least, and of several the one whose best size is nearest. Raises RequestError for more than
    any takes.
    """
    candidates = [
        (batch, abs(profile.opt - batch), number)
        for number, profile in enumerate(profiles)
        if count <= profile.max and (batch := max(count, profile.min))
    ]
    if not candidates:
        largest = max(profile.max for profile in profiles)
        raise RequestError(
            f"this engine takes batches of {format_profiles(profiles)} (N, or least:best:greatest), not {count};"
            f" ask for --micro-batch {largest}, or export it with a greater --batch"
        )
    batch, _, number = min(candidates)
    return number, batch
