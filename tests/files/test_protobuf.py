"""cm_runtime/files/protobuf.py: the bound on a message's fields, to the field."""

from __future__ import annotations

import io

import pytest

from cm_runtime.files.protobuf import MalformedError, fields, read_entry

FIELD = b"\x08\0"  # number 1, a varint


@pytest.mark.parametrize("most", [1, 7])
def test_as_many_fields_as_allowed_are_read_and_one_more_is_refused(most: int) -> None:
    assert len(list(fields(io.BytesIO(FIELD * most), 2 * most, most))) == most
    with pytest.raises(MalformedError, match=f"over {most} fields"):
        list(fields(io.BytesIO(FIELD * (most + 1)), 2 * most + 2, most))


def test_a_map_entry_may_have_eight_fields() -> None:
    """A key, a value, and others that protobuf would skip."""
    assert read_entry(b"\x0a\1k\x12\1v" + 6 * b"\x18\0") == ("k", b"v")
