"""cm_runtime/manifest.py on files that the onnx package wrote, and on everything such a file can become."""

import json
import os
import tracemalloc

import exports
import kills
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from cm_runtime.errors import ArtifactError, CmRuntimeError, OutputError
from cm_runtime.manifest import Manifest, Parity, TrainingSummary, data_path, parse_manifest, read_manifest
from cm_runtime.onnx_graph.export_writer import data_name, write_export, write_manifest

# What an exported file says of itself, as a reader of the format would write it down.
PLAIN = {
    "format_version": 1,
    "graph": "denoiser",
    "image_shape": [1, 28, 28],
    "num_classes": 10,
    "precond": "boundary",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_boundary": 0.002,
    "rho": 7.0,
    "sigmas": {"1": [80.0], "2": [80.0, 1.382368]},
    "precision": "fp32",
    "parity": {"engine": "onnxruntime 1.22", "max_abs": 3e-6, "sigmas": [80.0, 1.0, 0.002], "batches": [1, 3]},
    "source_sha256": "ab" * 32,
    "training": {"method": "cd", "data": "fashion-mnist", "steps": 500, "images": 64000, "seconds": 1080.5},
}


def model(metadata: dict[str, str], functions: bool = False) -> onnx.ModelProto:
    """An identity graph, as onnx.helper makes it."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 1, 28, 28]) for name in ("x", "denoised")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["denoised"])], "f", ends[:1], ends[1:])
    made = helper.make_model(graph, producer_name="a test", opset_imports=[helper.make_opsetid("", 20)])
    if functions:
        identity = helper.make_node("Identity", ["a"], ["b"])
        made.functions.append(
            helper.make_function("cm", "Same", ["a"], ["b"], [identity], [helper.make_opsetid("", 20)])
        )
    helper.set_model_props(made, metadata)
    onnx.checker.check_model(made)
    return made


SMALLEST = {"graph": "denoiser", "image_shape": [1, 28, 28], "num_classes": 10, "precond": "edm", "sigma_boundary": 0}


@pytest.fixture
def content() -> bytes:
    """A small file whose last entry is the manifest."""
    return model({"cm_runtime": json.dumps(PLAIN)}).SerializeToString()


def refusal(path: os.PathLike[str], content: bytes | None = None) -> str:
    if content is not None:
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def varint(number: int) -> bytes:
    """Protobuf's base-128 number, least significant group first."""
    groups = []
    while number >= 128:
        groups.append(number % 128 + 128)
        number //= 128
    return bytes([*groups, number])


def field(number: int, payload: bytes, length: int | None = None) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload) if length is None else length) + payload


# --- real files -------------------------------------------------------------------------------------------------------


def test_the_manifest_of_a_real_file_is_read(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    manifest = read_manifest(tmp_path / "m.onnx")
    assert manifest.image_shape == (1, 28, 28) and manifest.num_classes == 10
    assert manifest.sigmas == {1: (80.0,), 2: (80.0, 1.382368)}
    assert manifest.parity == Parity(engine="onnxruntime 1.22", max_abs=3e-6, sigmas=(80, 1, 0.002), batches=(1, 3))
    assert manifest.training is not None and manifest.training.images == 64000
    expected = PLAIN | {"training": PLAIN["training"] | {"config": {}}, "parity": PLAIN["parity"] | {"psnr": []}}
    assert json.loads(manifest.model_dump_json()) == expected


@pytest.mark.parametrize("functions", [False, True])
def test_other_entries_and_functions_do_not_get_in_the_way(tmp_path, functions):
    others = {"author": "someone", "cm_runtime": json.dumps(PLAIN), "empty": "", "notes": "x" * 255}
    onnx.save(model(others, functions), tmp_path / "m.onnx")
    assert read_manifest(str(tmp_path / "m.onnx")).num_classes == 10


def test_weights_beside_or_inside_do_not_get_in_the_way(tmp_path, content):
    made = onnx.load_from_string(content)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((255, 7), np.float32), "w"))
    onnx.save(made, tmp_path / "m.onnx")
    assert read_manifest(tmp_path / "m.onnx").num_classes == 10


@pytest.mark.parametrize("metadata", [{}, {"author": "someone"}, {"cm_runtime2": "{}", "CM_RUNTIME": "{}"}])
def test_another_programs_file_is_named_as_such(tmp_path, metadata):
    assert "was not exported by cm-runtime" in refusal(tmp_path / "m.onnx", model(metadata).SerializeToString())


def test_a_huge_file_takes_no_memory(tmp_path, content):
    """A graph of 3 GB, as a file with a hole in it, before the manifest."""
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(varint(7 << 3 | 2) + varint(3 << 30))
        file.seek(3 << 30, os.SEEK_CUR)
        file.write(content)
    tracemalloc.start()
    try:
        assert read_manifest(path).num_classes == 10
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(20)
def test_a_file_of_zeros_is_refused_at_once(tmp_path):
    """What a download that was interrupted after its space was reserved looks like."""
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 33)
    assert "not an ONNX file" in refusal(tmp_path / "m.onnx")


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model({"cm_runtime": json.dumps(SMALLEST)}).SerializeToString())
    assert read_manifest(path).num_classes == 10
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        refusal(path)


def test_every_truncation_of_a_file_with_functions_is_refused_or_a_model(tmp_path):
    """The functions follow the manifest: only a cut exactly between the two cannot be seen from the outside."""
    whole = model({"cm_runtime": json.dumps(SMALLEST)}, functions=True).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole)
    read = []
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        try:
            read_manifest(path)
            read.append(length)
        except ArtifactError:
            pass
    assert len(read) <= 1
    for length in read:
        assert onnx.load_from_string(whole[:length]).graph.node


def test_random_bytes_are_refused(tmp_path, rng):
    for size in (1, 3, 7, 255, 1023, 4096):
        for _ in range(10):
            refusal(tmp_path / "m.onnx", rng.bytes(size))


def test_random_damage_raises_nothing_but_the_refusal(tmp_path, rng, content):
    path = tmp_path / "m.onnx"
    for _ in range(120):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), rng.integers(1, 8)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert isinstance(read_manifest(path), Manifest)
        except ArtifactError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x80" * 20,
        b"\xff" * 20,
        b"\x00" * 20,
        b"\x3a",
        b"\x3a\x80",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        varint(7 << 3 | 3) + bytes(20),
        varint(7 << 3 | 6) + bytes(20),
        varint(7 << 3 | 1) + bytes(7),
        varint(7 << 3 | 5) + bytes(3),
        b"PK\x03\x04" + bytes(255),
        b"\x89PNG\r\n\x1a\n" + bytes(255),
        b"{}",
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path, damaged):
    assert "is not an ONNX file, or is truncated" in refusal(tmp_path / "m.onnx", damaged)


@pytest.mark.parametrize("claimed", [1 << 20, 1 << 31, 1 << 40, 1 << 63, (1 << 70) - 1])
def test_a_length_past_the_end_takes_no_memory(tmp_path, content, claimed):
    entry = field(1, b"cm_runtime") + field(2, b"{}")
    inner = field(1, b"cm_runtime") + field(2, b"{}", claimed)
    tracemalloc.start()
    try:
        refusal(tmp_path / "m.onnx", field(7, b"") + field(14, entry, claimed))
        refusal(tmp_path / "m.onnx", field(7, b"") + field(14, inner))
        refusal(tmp_path / "m.onnx", field(7, b"", claimed) + field(14, entry))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_manifest_beyond_its_limit_takes_no_memory(tmp_path):
    path = tmp_path / "m.onnx"
    head = field(1, b"cm_runtime") + varint(2 << 3 | 2) + varint(1 << 30)
    with path.open("wb") as file:
        file.write(field(7, b"") + varint(14 << 3 | 2) + varint(len(head) + (1 << 30)) + head)
        file.truncate(file.tell() + (1 << 30))
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_manifest_without_a_graph_is_refused(tmp_path):
    entry = field(1, b"cm_runtime") + field(2, json.dumps(PLAIN).encode())
    assert "no graph" in refusal(tmp_path / "m.onnx", field(14, entry))
    (tmp_path / "m.onnx").write_bytes(field(7, b"") + field(14, entry))
    assert read_manifest(tmp_path / "m.onnx").num_classes == 10  # the same entry, written by hand, does serve


def test_paths_that_hold_no_file_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.onnx")
    assert "is a folder, not a regular file" in refusal(tmp_path)
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "file").touch()
    assert "cannot be read" in refusal(tmp_path / "file" / "m.onnx")


def test_a_file_of_many_fields_is_refused_soon(tmp_path, content):
    """4 MB of fields of two bytes, which took 5 seconds; and an entry of them."""
    assert "over 20000 fields" in refusal(tmp_path / "m.onnx", content + b"\x08\0" * (1 << 21))
    entry = b"\x08\0" * 1000
    assert "over 8 fields" in refusal(tmp_path / "m.onnx", content + b"\x72" + varint(len(entry)) + entry)


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "device"])
def test_weights_that_are_no_file_are_refused(tmp_path, content, kind):
    (tmp_path / "m.onnx").write_bytes(content)
    manifest = read_manifest(tmp_path / "m.onnx").model_copy(update={"data_file": "m-0123456789ab.data"})
    beside = tmp_path / manifest.data_file
    if kind == "pipe":
        os.mkfifo(beside)
    elif kind == "folder":
        beside.mkdir()
    elif kind == "device":
        beside.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="put m-0123456789ab.data beside it" if kind == "missing" else f"a {kind}"):
        data_path(tmp_path / "m.onnx", manifest)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": [64, 4096, 4096]},
        {"sigma_data": 1e300},
        {"sigma_max": 1e300},
        {"training": {"method": "cd", "data": "x", "config": {"a": [[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]}}},
    ],
    ids=["image", "sigma_data", "sigma_max", "training"],
)
def test_sizes_that_no_model_has_are_refused(changes):
    with pytest.raises(ArtifactError, match=next(iter(changes)).replace("image_shape", "images of")):
        parse_manifest(json.dumps({**PLAIN, **changes}), "m.onnx")


# --- manifests --------------------------------------------------------------------------------------------------------


def change(**changes: object) -> str:
    return json.dumps({key: value for key, value in {**PLAIN, **changes}.items() if value != "left out"})


BAD_NAMES = [
    "weights.data",
    "../m-0123456789ab.data",
    "/tmp/m-0123456789ab.data",
    "a/m-0123456789ab.data",
    "..\\m-0123456789ab.data",
    "..m-0123456789ab.data",
    "C:m-0123456789ab.data",
    "m\n-0123456789ab.data",
    "m\0-0123456789ab.data",
    "m-0123456789ab.data\n",
    "m-0123456789AB.data",
    "m" * 240 + "-0123456789ab.data",
    "..",
    7,
]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (change(surprise=1), "surprise: Extra inputs"),
        (change(format_version=2), "format_version"),
        (change(graph="sampler"), "graph"),
        (change(graph="left out"), "graph: Field required"),
        (change(image_shape="left out"), "image_shape"),
        (change(image_shape=[28, 28]), "image_shape"),
        (change(image_shape=[1, 28, 28.5]), "image_shape.2"),
        (change(image_shape=[1, 0, 28]), "image_shape.1"),
        (change(image_shape=[1, 28, -28]), "image_shape.2"),
        (change(image_shape=[1 << 40, 1 << 40, 1 << 40]), "image_shape.0"),
        (change(num_classes=-1), "num_classes"),
        (change(num_classes="ten"), "num_classes"),
        (change(num_classes=1 << 70), "num_classes"),
        (change(precond="vp"), "precond"),
        (change(sigma_min=0), "sigma_min"),
        (change(sigma_min=float("nan")), "sigma_min"),
        (change(sigma_max=-80), "sigma_max"),
        (change(sigma_max=float("inf")), "sigma_max"),
        (change(sigma_min=81), "sigma_min"),
        (change(sigma_data=0), "sigma_data"),
        (change(sigma_boundary=-0.002), "sigma_boundary"),
        (change(sigma_boundary=0), "sigma_boundary"),
        (change(precond="edm"), "boundary at sigma 0"),
        (change(rho=0), "rho"),
        (change(rho=1e-3), "rho"),
        (change(rho=float("inf")), "rho"),
        (change(sigmas={"2": [1.0, 80.0]}), "sigma"),
        (change(sigmas={"2": [80.0]}), "sigmas for 2 steps are 1"),
        (change(sigmas={"1": [80.0, 2.0]}), "sigmas for 1 step are 2"),
        (change(sigmas={"2": [80.0, float("nan")]}), "sigma"),
        (change(sigmas={"2": [80.0, 0.001]}), "sigma"),
        (change(sigmas={"1": []}), "sigma"),
        (change(sigmas={"two": [80.0, 1.0]}), "sigmas"),
        (change(precision="fp64"), "precision"),
        (change(parity={"engine": "x", "max_abs": -1, "sigmas": [], "batches": []}), "parity.max_abs"),
        *[(change(data_file=name), "data_file") for name in BAD_NAMES],
        (change(training={**PLAIN["training"], "steps": -1}), "training.steps"),
        (change(training={**PLAIN["training"], "epochs": 3}), "training.epochs"),
        (change(**{"two\nlines": 1}), "Extra inputs"),
        ("", "JSON"),
        ("[]", "manifest"),
        ("null", "manifest"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (change()[:-1], "JSON"),
        (change() + "}", "JSON"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) or len(value) < 60 else "manifest",
)
def test_manifests_that_cannot_serve_are_refused_naming_file_and_field(text, complaint):
    with pytest.raises(ArtifactError, match=f"m.onnx: its cm_runtime manifest is not valid: .*{complaint}") as caught:
        parse_manifest(text, "m.onnx")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_the_smallest_manifest_has_the_papers_defaults():
    manifest = parse_manifest(json.dumps(SMALLEST), "m.onnx")
    assert (manifest.sigma_min, manifest.sigma_max, manifest.sigma_data, manifest.rho) == (0.002, 80.0, 0.5, 7.0)
    assert manifest.sigmas == {} and manifest.training is None and not manifest.is_teacher


@pytest.mark.parametrize(("method", "teacher"), [("edm", True), ("cd", False), ("ct", False), ("ect", False)])
def test_only_edm_makes_a_teacher(make_manifest, method, teacher):
    training = TrainingSummary(method=method, data="x", steps=0, images=0, seconds=0)
    assert make_manifest(training=training).is_teacher is teacher


def test_a_manifest_does_not_change(make_manifest):
    with pytest.raises(ValidationError, match="frozen"):
        make_manifest().sigma_max = 1.0


def test_a_refusal_can_be_caught_as_any_of_its_bases(tmp_path):
    with pytest.raises(CmRuntimeError):
        read_manifest(tmp_path / "none.onnx")


# --- another manifest in the same file --------------------------------------------------------------------------------


def tuned(path: os.PathLike[str]) -> Manifest:
    return read_manifest(path).model_copy(update={"sigmas": {3: (80.0, 5.0, 0.7)}})


@pytest.mark.parametrize("functions", [False, True])
def test_only_the_manifest_is_replaced(tmp_path, functions):
    """The onnx package finds the same graph, functions and other entries in the copy, and one manifest."""
    others = {"author": "someone", "cm_runtime": json.dumps(PLAIN), "notes": "x" * 255}
    before = model(others, functions)
    before.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(255 * 7, dtype=np.float32), "w"))
    onnx.save(before, tmp_path / "m.onnx")
    write_manifest(tmp_path / "m.onnx", tmp_path / "new.onnx", tuned(tmp_path / "m.onnx"))
    after = onnx.load(tmp_path / "new.onnx")
    onnx.checker.check_model(after)
    entries = {prop.key: prop.value for prop in after.metadata_props}
    assert json.loads(entries.pop("cm_runtime"))["sigmas"] == {"3": [80.0, 5.0, 0.7]}
    assert len(after.metadata_props) == 3 and entries == {"author": "someone", "notes": "x" * 255}
    for made in (before, after):
        del made.metadata_props[:]
    assert after == before
    assert read_manifest(tmp_path / "new.onnx").sigmas == {3: (80.0, 5.0, 0.7)}
    assert read_manifest(tmp_path / "m.onnx").sigmas == {1: (80.0,), 2: (80.0, 1.382368)}


def test_a_manifest_is_replaced_in_place_by_force_only(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="--force"):
        write_manifest(path, path, tuned(path))
    assert path.read_bytes() == content
    write_manifest(path, path, tuned(path), force=True)
    assert read_manifest(path).sigmas == {3: (80.0, 5.0, 0.7)}
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_copies_of_a_manifest_in_one_file_are_all_replaced(tmp_path, content):
    """Whichever of them a reader takes, it reads the new one."""
    path = tmp_path / "m.onnx"
    entry = onnx.load_from_string(content).metadata_props[0].SerializeToString()
    path.write_bytes(content + field(14, entry))
    write_manifest(path, path, tuned(path), force=True)
    assert [prop.key for prop in onnx.load(path).metadata_props] == ["cm_runtime"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_file_that_cannot_be_read_gets_no_manifest(tmp_path, content, damage):
    path, target = tmp_path / "m.onnx", tmp_path / "new.onnx"
    path.write_bytes(content)
    manifest = tuned(path)
    path.write_bytes(content[:-5] if damage == "truncated" else model({}).SerializeToString())
    if damage == "missing":
        path.unlink()
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        write_manifest(path, target, manifest)
    assert not target.exists() and not list(tmp_path.glob(".cm-*"))


@pytest.mark.process
def test_a_large_file_is_copied_in_pieces(tmp_path, content):
    """A graph of 64 MB takes a few."""
    path = tmp_path / "m.onnx"
    path.write_bytes(field(7, b"", 64 << 20) + bytes(64 << 20) + content)
    tracemalloc.start()
    write_manifest(path, path, tuned(path), force=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert read_manifest(path).sigmas == {3: (80.0, 5.0, 0.7)}


# --- weights in a file beside it --------------------------------------------------------------------------------------

DATA = "m-0123456789ab.data"


@pytest.fixture
def apart(tmp_path):
    """A small file whose manifest names a data file, and that file, in a folder of their own."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(model({"cm_runtime": json.dumps({**PLAIN, "data_file": DATA})}).SerializeToString())
    (folder / DATA).write_bytes(b"weights" * 1023)
    return folder / "m.onnx"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_name_of_the_data_file_is_stored_only_where_there_is_one(make_manifest):
    assert "data_file" not in json.loads(make_manifest().model_dump_json())
    assert json.loads(make_manifest(data_file=DATA).model_dump_json())["data_file"] == DATA
    for name in ("", DATA):
        assert parse_manifest(make_manifest(data_file=name).model_dump_json(), "m.onnx").data_file == name


@pytest.mark.parametrize("stem", ["m", "a b+c", "v1..2", "x\n", "x" * 250, "\u5b57" * 80, "a:b\\c", ".hidden"])
def test_every_export_has_a_data_files_name_that_a_manifest_takes(make_manifest, stem):
    name = data_name(f"folder/{stem}.onnx", "0123456789abcdef" * 4)
    assert name.endswith("-0123456789ab.data") and len(name.encode()) <= 255
    assert make_manifest(data_file=name).data_file == name


def test_a_copy_in_another_folder_brings_its_data_file(tmp_path, apart):
    target = tmp_path / "target" / "new.onnx"
    target.parent.mkdir()
    write_manifest(apart, target, tuned(apart))
    found = contents(target.parent)
    assert set(found) == {"new.onnx", DATA} and found[DATA] == (apart.parent / DATA).read_bytes()
    assert read_manifest(target).data_file == DATA and read_manifest(target).sigmas == {3: (80.0, 5.0, 0.7)}
    (apart.parent / DATA).unlink()
    assert set(contents(target.parent)) == {"new.onnx", DATA}
    write_manifest(target, target, tuned(target), force=True)  # again, in place
    assert contents(target.parent)[DATA] == found[DATA]


@pytest.mark.process
def test_a_copied_data_file_has_one_name_as_the_onnx_package_wants_it(tmp_path, tmp_path_factory):
    boundary = exports.Files("boundary", tmp_path_factory)
    target = tmp_path / "tuned.onnx"
    write_manifest(boundary.apart, target, tuned(boundary.apart))
    assert os.stat(exports.data_file(target)).st_nlink == 1
    onnx.load(target)


def test_a_copy_in_the_same_folder_shares_the_data_file(apart):
    node = os.stat(apart.parent / DATA).st_ino
    write_manifest(apart, apart.with_name("new.onnx"), tuned(apart))
    assert set(contents(apart.parent)) == {"m.onnx", "new.onnx", DATA}
    assert os.stat(apart.parent / DATA).st_ino == node


@pytest.mark.parametrize("length", [7161, 100, 0])
def test_a_data_file_that_is_there_is_taken_if_it_has_the_size(tmp_path, apart, length):
    (tmp_path / "target").mkdir()
    there = tmp_path / "target" / DATA
    there.write_bytes(bytes(length))
    write_manifest(apart, tmp_path / "target" / "m.onnx", tuned(apart))
    assert there.read_bytes() == (bytes(length) if length == 7161 else (apart.parent / DATA).read_bytes())


def test_a_copy_without_its_data_file_is_refused(tmp_path, apart):
    (apart.parent / DATA).unlink()
    before = contents(apart.parent)
    for target in (apart, tmp_path / "new.onnx"):
        with pytest.raises(ArtifactError, match=f"m.onnx: its weights are not there: put {DATA} beside it") as caught:
            write_manifest(apart, target, tuned(apart), force=True)
        assert "\n" not in str(caught.value)
    assert contents(apart.parent) == before and not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".cm-*"))


def test_a_copy_that_fails_leaves_neither_file(tmp_path, apart, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "target").mkdir()
    monkeypatch.setattr("cm_runtime.files.atomic.place", fail)
    with pytest.raises(OutputError, match=r"new\.onnx cannot be written: No space left on device"):
        write_manifest(apart, tmp_path / "target" / "new.onnx", tuned(apart))
    assert contents(tmp_path / "target") == {}


@pytest.mark.parametrize("other", ["a reader", "a later version", "nobody", "not ours"])
def test_the_data_file_of_a_file_that_is_replaced_goes_unless_another_names_it(tmp_path, content, apart, other):
    (tmp_path / "small.onnx").write_bytes(content)
    if other != "nobody":
        said = {**PLAIN, "data_file": DATA} | ({"format_version": 2} if other == "a later version" else {})
        third = model({} if other == "not ours" else {"cm_runtime": json.dumps(said)})
        apart.with_name("third.onnx").write_bytes(third.SerializeToString())
    write_manifest(tmp_path / "small.onnx", apart, tuned(tmp_path / "small.onnx"), force=True)
    assert (apart.parent / DATA).exists() is (other in ("a reader", "a later version"))


def test_no_file_but_a_data_file_of_ours_is_removed_whatever_a_manifest_says(tmp_path, content):
    (tmp_path / "small.onnx").write_bytes(content)
    (tmp_path / "thesis.txt").touch()
    target = tmp_path / "m.onnx"
    for name in ("thesis.txt", "../thesis.txt", str(tmp_path / "thesis.txt")):
        target.write_bytes(model({"cm_runtime": json.dumps({**PLAIN, "data_file": name})}).SerializeToString())
        write_manifest(tmp_path / "small.onnx", target, tuned(tmp_path / "small.onnx"), force=True)
        assert set(contents(tmp_path)) == {"m.onnx", "small.onnx", "thesis.txt"}


@pytest.mark.process
def test_a_kill_at_any_moment_leaves_an_export_whole_and_the_next_sweeps_its_data_files(tmp_path):
    """An export over another, whose weights were others."""

    def export(folder, word, digits):
        said = {**PLAIN, "data_file": f"m-{digits}.data", "source_sha256": word}
        with write_export(folder / "m.onnx", force=True) as (temporary, data):
            temporary.write_bytes(model({"cm_runtime": json.dumps(said)}).SerializeToString())
            data.write_text(word)

    before = tmp_path / "before"
    before.mkdir()
    (before / "m-notes.data").touch()
    (before / "n-000000000000.data").touch()
    others = {"m-notes.data", "n-000000000000.data"}
    export(before, "old", "0123456789ab")
    for folder in kills.folders(before, lambda folder: export(folder, "new", "ba9876543210"), tmp_path):
        manifest = read_manifest(folder / "m.onnx")
        assert (folder / manifest.data_file).read_text() == manifest.source_sha256
        assert kills.runs(lambda folder: export(folder, "third", "001122334455"), folder)
        assert {path.name for path in folder.iterdir()} == {"m.onnx", "m-001122334455.data", *others}


def test_a_pipe_called_as_an_export_does_not_keep_one_waiting(tmp_path, apart, content):
    os.mkfifo(apart.with_name("pipe.onnx"))
    (tmp_path / "small.onnx").write_bytes(content)
    write_manifest(tmp_path / "small.onnx", apart, tuned(tmp_path / "small.onnx"), force=True)
    assert not (apart.parent / DATA).exists()
