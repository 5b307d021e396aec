"""Checked, immutable records, and one line on the first fault of what does not fit one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError


class Record(BaseModel):
    """A value of named fields that refuses unknown keys, NaN, infinities and assignment."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Return the dotted path of the first field at fault, "" for the whole value, and pydantic's message on it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")


def explain(error: ValidationError, whole: str = "") -> str:
    """Write the first fault as ``field: message``; ``whole`` names the field where the whole value is at fault."""
    field, message = first_fault(error)
    return ": ".join(filter(None, (field or whole, message)))
