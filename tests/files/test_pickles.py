"""cm_runtime/files/pickles.py: what torch writes of tensors is followed to its end, and nothing else is."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cm_runtime.checkpoints.native import load_torch
from cm_runtime.errors import CheckpointError
from cm_runtime.files import pickles
from cm_runtime.files.pickles import Allowance, check_pickle

LEVELS = pickles.MOST_LEVELS


def archive(path: Path, instructions: bytes, **records: bytes) -> Path:
    """A zip as torch has it around a pickle, with the storages' bytes by name."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", instructions)
        file.writestr("archive/version", "3\n")
        for name, content in records.items():
            file.writestr(f"archive/data/{name}", content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_torch(path)
    return str(caught.value)


def doubled(levels: int) -> bytes:
    """A tuple of two of a tuple of two, ...: 2^levels values in some bytes a level."""
    return b"K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(levels))


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + len(content).to_bytes(4, "little") + content


def storage(key: str, count: int) -> bytes:
    """A float32 storage by its name."""
    return (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"J%btQ" % count.to_bytes(4, "little")
    )


HOSTILE: dict[str, tuple[bytes, str]] = {
    "bytearray": (b"cbuiltins\nbytearray\n(\x8a\x05\x00\x28\x6b\xee\x00tR.", "could run code"),
    "set": (b"\x8f.", "could run code"),
    "system": (b"cos\nsystem\n(X\x01\x00\x00\x00.tR.", "could run code"),
    "a method hidden": (b"ccollections\nOrderedDict\n)R}" + text("items") + b"K\x01sb.", "sets attributes"),
    "tuples as names": (doubled(60) + b"}h\x3cK\x01s.", "over 1000000 values"),
    "a tuple as a name": (b"}K\x01K\x02\x86K\x01s.", "a tuple for the name of an item"),
    "lists in lists": (b"]" * 900 + b"a" * 899 + b".", f"nests over {LEVELS} levels"),
    "tuples in tuples": (b")" + b"\x85" * 900 + b".", f"nests over {LEVELS} levels"),
    "a list in itself": (b"]q\x00h\x00a.", "in two places, or inside itself"),
    "a mapping in two places": (b"](}q\x00h\x00e.", "in two places, or inside itself"),
    "a long number": (b"\x8a\xff" + b"\x7f" * 255 + b".", "a whole number of 2039 bits"),
    "half a letter": (text("\ud800") + b".", "a text that is no Unicode"),
    "steps": (b"N" * 1_000_001 + b".", "over 1000000 instructions"),
    "storages by their letters' case": (
        b"(" + b"".join(storage(key, 200) for key in ("aa", "aA", "Aa", "AA")) + b"t.",
        "its tensors claim more than",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_torch_would_follow_is_refused_before(tmp_path: Path, kind: str) -> None:
    instructions, words = HOSTILE[kind]
    path = archive(tmp_path / "x.pt", b"\x80\x02" + instructions, aa=bytes(800))
    assert words in refusal(path)


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(1).expand(1 << 40), "claims 4398046511104 bytes of the 4 that are stored"),
        (lambda: torch.zeros(3).to_sparse(), "is not a dense tensor of numbers"),
        (lambda: torch.zeros(3, device="meta"), "is not a dense tensor of numbers"),
        (quantised, "is not a dense tensor of numbers"),
        (nested, "is not a dense tensor of numbers"),
    ],
    ids=["stride 0", "sparse", "meta", "quantised", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_named(
    tmp_path: Path, make: Callable[[], torch.Tensor], words: str, legacy: bool
) -> None:
    torch.save({"a.weight": make()}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    assert f"a.weight {words}" in refusal(tmp_path / "x.pt")


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    whole = torch.zeros(1 << 16)
    torch.save({str(n): whole for n in range(4)}, tmp_path / "few.pt")
    assert len(load_torch(tmp_path / "few.pt")) == 4  # tied weights
    torch.save({str(n): whole[n % 7 :] for n in range(64)}, tmp_path / "many.pt")
    assert "its tensors claim more than" in refusal(tmp_path / "many.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_what_torch_writes_is_read(tmp_path: Path, legacy: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    base = torch.arange(24.0).reshape(4, 6)
    content: dict[str, Any] = {
        "module": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "views": [base, base[1:3, ::2], base.T],
        "types": [torch.zeros(3, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.int64, torch.bool)],
        "empty": torch.zeros(0),
        "shape": base.shape,
        "plain": [1, -5, 2**40, 0.5, None, True, "text", (1, "a"), {"b": []}],
    }
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load_torch(tmp_path / "x.pt")
    assert loaded["plain"] == content["plain"] and loaded["shape"] == (4, 6)
    assert list(loaded["module"]) == list(content["module"])
    for mine, theirs in zip([*loaded["views"], *loaded["types"]], [*content["views"], *content["types"]], strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


def test_the_mapping_of_python_2_is_followed() -> None:
    """collections.OrderedDict called with a list of pairs."""
    content = b"\x80\x02ccollections\nOrderedDict\n](](U\x01aK\x02ee\x85R."
    assert pickle.loads(content) == OrderedDict(a=2)
    check_pickle(io.BytesIO(content), Allowance(0))
    with pytest.raises(pickle.UnpicklingError):
        check_pickle(io.BytesIO(b"\x80\x02cbuiltins\neval\n."), Allowance(0))
