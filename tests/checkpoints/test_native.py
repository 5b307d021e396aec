"""cm_runtime/checkpoints/native.py: what was saved comes back bit for bit, and no file can do more than be refused."""

import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cm_runtime.checkpoints import native
from cm_runtime.checkpoints.native import FORMAT, Checkpoint, load_plain, read_checkpoint, save_checkpoint, save_plain
from cm_runtime.errors import CheckpointError, OutputError, RequestError
from cm_runtime.files.atomic import sha256
from cm_runtime.manifest import TrainingSummary
from cm_runtime.networks.consistency import build

TRAINING = TrainingSummary(method="cd", data="fashion-mnist", steps=500, images=64000, seconds=1080.5, config={"N": 40})
BIAS = "F.time_embed.0.bias"


@pytest.fixture(scope="module")
def config(make_config):
    return make_config(channel_mult=(1,), image_size=4, image_channels=1, num_classes=3)


@pytest.fixture(scope="module")
def weights(config, randomised):
    return {name: tensor.detach().clone() for name, tensor in randomised(build(config)).state_dict().items()}


@pytest.fixture(scope="module")
def checkpoint(config, weights, randomised):
    other = {name: tensor.detach().clone() for name, tensor in randomised(build(config), 1).state_dict().items()}
    return Checkpoint(config, "0.999", {"0.999": weights, "0.9999": other}, TRAINING)


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
    """A good file, to be read only."""
    path = tmp_path_factory.mktemp("checkpoint") / "good.pt"
    save_checkpoint(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def content(config, weights):
    """What a checkpoint with one EMA rate holds, as plain containers."""
    return {
        "format": "cm-runtime checkpoint 1",
        "config": config.model_dump(mode="json"),
        "default_ema": "0.999",
        "ema": {"0.999": weights},
        "training": TRAINING.model_dump(mode="json"),
    }


def refusal(path, content=None):
    """The one line with which a file is refused."""
    if content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1000
    return message


# --- round trips ------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back_bit_for_bit(saved, checkpoint, config):
    found = read_checkpoint(saved)
    assert found.config == config and found.training == TRAINING and found.default_ema == "0.999"
    assert list(found.ema) == ["0.999", "0.9999"]
    for rate, weights in checkpoint.ema.items():
        assert list(found.ema[rate]) == list(weights)
        for name, tensor in weights.items():
            assert found.ema[rate][name].dtype == tensor.dtype and torch.equal(found.ema[rate][name], tensor), name
    assert found.sha256 == sha256(saved)
    assert read_checkpoint(str(saved)).sha256 == found.sha256


def test_the_file_is_plain_torch_and_the_documented_layout(saved, weights):
    content = torch.load(saved, weights_only=True)
    assert sorted(content) == ["config", "default_ema", "ema", "format", "training"]
    assert content["format"] == FORMAT == "cm-runtime checkpoint 1"
    assert json.loads(json.dumps(content["config"])) == content["config"]
    assert torch.equal(content["ema"]["0.999"][BIAS], weights[BIAS])


def test_a_file_that_only_torch_wrote_is_read(tmp_path, content, weights):
    torch.save(content, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert torch.equal(found.ema["0.999"][BIAS], weights[BIAS])


def test_the_same_checkpoint_is_the_same_bytes(tmp_path, saved, checkpoint):
    """Its hash goes into every export: it should say the same of the same weights."""
    save_checkpoint(checkpoint, tmp_path / "another name.pt")
    assert sha256(tmp_path / "another name.pt") == sha256(saved)


def test_the_model_of_a_rate_computes_with_its_weights(saved, checkpoint, config, rng):
    x = torch.from_numpy(rng.standard_normal((3, 1, 4, 4))).float()
    sigma, label = torch.tensor([0.01, 1.0, 80.0]), torch.tensor([0, 1, 2])
    loaded = read_checkpoint(saved)
    for rate, chosen in (("0.999", None), ("0.999", "0.999"), ("0.9999", "0.9999")):
        reference = build(config)
        reference.load_state_dict(checkpoint.ema[rate])
        model = loaded.model(chosen)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        with torch.no_grad():
            assert torch.equal(model(x, sigma, label), reference.eval()(x, sigma, label))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_kept_and_computed_in_float32(tmp_path, content, weights, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    torch.save({**content, "ema": {"0.999": stored}}, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    save_checkpoint(found, tmp_path / "y.pt")
    again = read_checkpoint(tmp_path / "y.pt")
    for name, tensor in again.ema["0.999"].items():
        assert tensor.dtype == dtype and torch.equal(tensor, stored[name])
    for name, tensor in again.model().state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name].float())
    if dtype == torch.float16:
        assert (tmp_path / "y.pt").stat().st_size < 0.7 * sum(4 * tensor.numel() for tensor in weights.values())


def test_the_manifest_says_what_the_config_says(checkpoint, make_config, weights):
    manifest = checkpoint.manifest()
    assert manifest.image_shape == (1, 4, 4) and manifest.num_classes == 3 and manifest.graph == "denoiser"
    assert manifest.training == TRAINING and manifest.parity is None
    other = {"precond": "edm", "sigma_boundary": 0, "sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 50, "rho": 3}
    manifest = Checkpoint(make_config(f=other), "1", {"1": weights}, TRAINING, sha256="ab" * 32).manifest()
    assert {name: getattr(manifest, name) for name in other} == other
    assert manifest.source_sha256 == "ab" * 32 and manifest.image_shape == (3, 8, 8)


def test_a_rate_it_does_not_hold_is_refused(checkpoint):
    with pytest.raises(RequestError, match=r"no EMA rate 0.5; the checkpoint holds 0.999, 0.9999"):
        checkpoint.model("0.5")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, checkpoint):
    """A limit on the size of files stands in for the disk."""
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OutputError, match=r"x.pt cannot be written: ") as caught:
            save_checkpoint(checkpoint, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.pt"]


def test_a_missing_folder_is_refused(tmp_path, checkpoint):
    with pytest.raises(OutputError, match="there is no folder"):
        save_checkpoint(checkpoint, tmp_path / "none" / "x.pt")


def test_plain_content_comes_back(tmp_path):
    plain = {"step": 7, "lists": [1, [2.5, "three"], None], "tensor": torch.arange(255, dtype=torch.uint8)}
    save_plain(plain, tmp_path / "x.pt")
    found = load_plain(tmp_path / "x.pt")
    assert torch.equal(found.pop("tensor"), plain["tensor"])
    assert found == {"step": 7, "lists": [1, [2.5, "three"], None]}


# --- hostile files ----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it would touch a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mknod, (str(self.canary),)


@pytest.mark.parametrize("where", ["format", "ema", "tensor", "whole"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, content, weights, where):
    canary = tmp_path / "canary"
    bomb = Bomb(canary)
    hostile = {
        "format": {**content, "format": bomb},
        "ema": {**content, "ema": bomb},
        "tensor": {**content, "ema": {"0.999": {**weights, BIAS: bomb}}},
        "whole": bomb,
    }[where]
    assert "could run code, which cm-runtime never does" in refusal(tmp_path / "x.pt", hostile)
    assert not canary.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)  # the bomb is a real one
    assert canary.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["pickle", "torch before 1.6"])
def test_a_plain_pickle_is_refused_and_not_run(tmp_path, content, legacy):
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    hostile = {**content, "format": Bomb(canary)}
    if legacy:
        torch.save(hostile, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(hostile))
    assert "could run code, which cm-runtime never does" in refusal(path)
    assert not canary.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "torch before 1.6"])
def test_torch_runs_no_code_either_that_the_check_of_pickles_misses(tmp_path, content, monkeypatch, legacy):
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    torch.save({**content, "format": Bomb(canary)}, path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.setattr(native, "check_pickle", lambda *_: None)
    assert "could run code, which cm-runtime never does" in refusal(path)
    assert not canary.exists()


def repacked(source, target, change=None, compression=zipfile.ZIP_STORED):
    """The archive anew, entries changed by name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression, compresslevel=1) as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(entry.filename, (change or {}).get(name, old.read(entry)))
    return target


def test_repacking_alone_changes_nothing(tmp_path, saved):
    assert read_checkpoint(repacked(saved, tmp_path / "x.pt")).default_ema == "0.999"


def test_a_zip_bomb_is_refused_without_inflating_it(tmp_path, saved):
    """An entry of 32 MB that is a few kB in a file of a little over 1 MB."""
    bomb = repacked(saved, tmp_path / "x.pt", {"data/0": bytes(1 << 25)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 21
    tracemalloc.start()
    try:
        assert "it claims" in refusal(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "instructions",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x020.",
        b"\x80\x02s.",
        b"\x80\x02h\x00.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02\x8a\xffabc.",
        b"\x80\x02J\x01.",
        b"\x80\x02G\x01.",
        b"\x80\x02(t.",
        b"\x80\x02t.",
        b"\x80\x02}K\x01.",
        b"\x80\x02]K\x01a.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02K\x01b.",
        b"\x80\x02K\x01Q.",
        b"\x80\x02(K\x01K\x02tQ.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01R.",
        b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
        b"\x80\x02\xff.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_that_make_no_sense_are_refused(tmp_path, saved, instructions):
    refusal(repacked(saved, tmp_path / "x.pt", {"data.pkl": instructions}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_raise_nothing_but_the_refusal(tmp_path, rng):
    """Small content, many damages; the loader below the format check is what must hold."""
    save_plain({"a": torch.arange(7.0), "b": [1, "x", {"c": 2.5}]}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        good = archive.read(name)
    for _ in range(80):
        damaged = bytearray(good)
        for place in rng.integers(2, len(good), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        repacked(tmp_path / "good.pt", tmp_path / "x.pt", {"data.pkl": bytes(damaged)})
        try:
            assert isinstance(load_plain(tmp_path / "x.pt"), dict)
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(tmp_path, saved, share):
    whole = saved.read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: int(share * len(whole))])
    assert "is not a torch checkpoint" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("missing", [1, 3, 7, 22, 23, 255])
def test_a_file_without_its_last_bytes_is_refused(tmp_path, saved, missing):
    (tmp_path / "x.pt").write_bytes(saved.read_bytes()[:-missing])
    assert "is not a torch checkpoint" in refusal(tmp_path / "x.pt")


def test_an_archive_without_its_parts_is_refused(tmp_path, saved):
    for gone in ("data.pkl", "data/0"):
        path = tmp_path / "x.pt"
        with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                if entry.filename.partition("/")[2] != gone:
                    new.writestr(entry.filename, old.read(entry))
        refusal(path)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        new.writestr("readme.txt", "hello")
    refusal(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt", "w"):
        pass
    refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("sigmas", ["abc", 3, [1, 2], {2: "x"}, {2: [80.0]}, {2: [80.0, 90.0]}, {"two": [80.0, 1.0]}])
def test_levels_that_are_none_are_refused(tmp_path, content, sigmas):
    torch.save({**content, "sigmas": sigmas}, tmp_path / "x.pt")
    line = refusal(tmp_path / "x.pt")
    assert "is damaged" in line and "sigmas" in line


def test_files_of_other_programs_are_refused(tmp_path, rng):
    np.savez(tmp_path / "x.npz", a=np.arange(7))
    refusal(tmp_path / "x.npz")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    refusal(tmp_path / "x.safetensors")
    for size in (1, 3, 7, 255, 4096):
        (tmp_path / "x.pt").write_bytes(rng.bytes(size))
        refusal(tmp_path / "x.pt")


def test_paths_that_hold_no_file_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "is a folder, not a regular file" in refusal(tmp_path)
    refusal(tmp_path / ("x" * 300 + ".pt"))


LOOP: dict[str, object] = {}
LOOP["x"] = LOOP


def nested(levels):
    return [nested(levels - 1)] if levels else 1


@pytest.mark.parametrize(
    ("summary", "complaint"),
    [
        ({"a": torch.zeros(2)}, "it has a Tensor, which JSON has not"),
        (LOOP, "in two places, or inside itself"),
        ({"a": bytearray(b"x")}, "could run code"),
        ({"a": {1}}, "could run code"),
        ({"a": "\ud800"}, "no Unicode"),
        ({"a": float("nan")}, "not finite"),
        ({"a": nested(30)}, "nests over 20 levels"),
        ({"a": nested(150)}, "nests over 100 levels"),
        ({"a": list(range(20_000))}, "over 10000 values"),
        ({"a": "x" * (1 << 19)}, "letters"),
        ({1: "x"}, "a name that is no text"),
        ([1], "config"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_a_training_summary_that_no_manifest_can_hold_is_refused(tmp_path, content, summary, complaint):
    training = {**content["training"], "config": summary}
    assert complaint in refusal(tmp_path / "x.pt", {**content, "training": training})


@pytest.mark.parametrize(("name", "value"), [("sigma_data", 1e300), ("sigma_data", 1e-300), ("sigma_max", 1e300)])
def test_levels_beyond_float32_are_refused(tmp_path, content, name, value):
    assert name in refusal(tmp_path / "x.pt", {**content, "config": {**content["config"], name: value}})


def test_images_far_too_large_are_refused(tmp_path, content):
    network = {**content["config"]["network"], "image_size": 4096, "image_channels": 64}
    wrong = refusal(tmp_path / "x.pt", {**content, "config": {**content["config"], "network": network}})
    assert "images of 64x4096x4096 are too large" in wrong


@pytest.mark.parametrize("changes", [{"default_ema": 5}, {"ema": {5: {}}}, {"ema": {"0.999": {}, 5: {}}}])
def test_rates_without_names_are_refused(tmp_path, content, changes):
    assert "EMA rate" in refusal(tmp_path / "x.pt", {**content, **changes})


# --- checkpoints that do not hold together ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [[1, 2], "text", 7, None, torch.zeros(3), {}, {"state_dict": {}}], ids=repr)
def test_other_content_is_not_our_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "is not a cm-runtime checkpoint" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["config", "default_ema", "ema", "training"])
def test_a_missing_part_is_named(tmp_path, content, key):
    assert f"it has no '{key}'" in refusal(tmp_path / "x.pt", {k: v for k, v in content.items() if k != key})


@pytest.mark.parametrize("wrong", ["cm-runtime checkpoint 2", "", None, 1, torch.zeros(2)], ids=repr)
def test_another_format_is_refused(tmp_path, content, wrong):
    assert "is not a cm-runtime checkpoint" in refusal(tmp_path / "x.pt", {**content, "format": wrong})


@pytest.mark.parametrize(
    "ema",
    [
        None,
        5,
        "0.999",
        [],
        ["0.999"],
        {},
        {"0.9": {}},
        {"0.999": 5},
        {"0.999": None},
        {"0.999": {"a": 1}},
        torch.zeros(3),
    ],
    ids=repr,
)
def test_weights_that_are_no_state_dicts_are_refused(tmp_path, content, ema):
    refusal(tmp_path / "x.pt", {**content, "ema": ema})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"surprise": 1}, "surprise: Extra inputs"),
        ({"two\nlines": 1}, "Extra inputs"),
        ({"precond": "vp"}, "precond"),
        ({"sigma_max": -1}, "sigma_max"),
        ({"sigma_max": float("nan")}, "sigma_max"),
        ({"sigma_boundary": 0.0}, "boundary"),
        ({"precond": "edm"}, "boundary"),
        ({"network": None}, "network"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_named(tmp_path, content, changes, complaint):
    assert complaint in refusal(tmp_path / "x.pt", {**content, "config": {**content["config"], **changes}})


@pytest.mark.parametrize("part", ["config", "training"])
@pytest.mark.parametrize("wrong", [None, 5, [], "text", torch.zeros(2)], ids=repr)
def test_parts_that_are_no_tables_are_refused(tmp_path, content, part, wrong):
    refusal(tmp_path / "x.pt", {**content, part: wrong})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth": 3}, "network.depth: Extra inputs"),
        ({"image_size": 7, "patch": 2}, "image_size 7 must be a multiple of 2"),
        ({"channels": 10**12}, "network.channels"),
        ({"image_size": 10**9}, "network.image_size"),
        ({"res_blocks": 10**9}, "network.res_blocks"),
        ({"channel_mult": [10**9]}, "channel_mult"),
        ({"channel_mult": [1] * 10_000}, "network.channel_mult"),
        ({"num_classes": 10**12}, "network.num_classes"),
        ({"channels": "many"}, "network.channels"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_network_that_cannot_be_is_named(tmp_path, content, changes, complaint):
    network = {**content["config"]["network"], **changes}
    assert complaint in refusal(tmp_path / "x.pt", {**content, "config": {**content["config"], "network": network}})


def test_a_network_far_larger_than_its_file_takes_no_memory(tmp_path, content):
    """A hundred billion parameters by its config, whose tensors then are not there."""
    network = {**content["config"]["network"], "channels": 4096, "channel_mult": [16], "head_channels": 4096}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(tmp_path / "x.pt", {**content, "config": {**content["config"], "network": network}})
    assert "should be" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # kB


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop(BIAS), f"missing {BIAS}"),
        (lambda w: w.update({"F.extra": torch.zeros(3)}), "unexpected F.extra"),
        (lambda w: w.update({"two\nlines": torch.zeros(3)}), "unexpected"),
        (lambda w: w.update({7: torch.zeros(3)}), "unexpected 7"),
        (lambda w: w.update({BIAS: torch.zeros(127)}), rf"{BIAS} is (127,) and should be (128,)"),
        (lambda w: w.update({BIAS: torch.zeros(1, 128)}), rf"{BIAS} is (1, 128) and should be (128,)"),
        (lambda w: w.update({BIAS: torch.zeros(())}), rf"{BIAS} is () and should be (128,)"),
        (lambda w: w.update({BIAS: torch.full((128,), float("nan"))}), f"{BIAS} is not finite"),
        (lambda w: w.update({BIAS: torch.full((128,), float("inf"))}), f"{BIAS} is not finite"),
        (lambda w: w.update({BIAS: torch.zeros(128, dtype=torch.int64)}), BIAS),
        (lambda w: w.update({BIAS: torch.zeros(128, dtype=torch.bool)}), BIAS),
        (lambda w: w.update({BIAS: torch.zeros(128, dtype=torch.complex64)}), BIAS),
        (lambda w: w.update({BIAS: torch.zeros(128).to(torch.float8_e4m3fn)}), BIAS),
        (lambda w: w.update({BIAS: torch.zeros(128).to_sparse()}), BIAS),
        (lambda w: w.update({BIAS: torch.zeros(128, device="meta")}), BIAS),
        (lambda w: w.update({BIAS: 1.0}), "state dict"),
        (lambda w: w.clear(), "more)"),
    ],
    ids=[
        "missing",
        "extra",
        "a name of two lines",
        "a number for a name",
        "short",
        "another rank",
        "a scalar",
        "NaN",
        "infinite",
        "integers",
        "booleans",
        "complex",
        "8 bits",
        "sparse",
        "without content",
        "a number",
        "empty",
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, content, weights, change, complaint):
    wrong = dict(weights)
    change(wrong)
    assert complaint in refusal(tmp_path / "x.pt", {**content, "ema": {"0.999": wrong}})


def test_every_rate_is_checked(tmp_path, content, weights):
    both = {"0.999": weights, "0.9999": {**weights, BIAS: torch.full((128,), float("nan"))}}
    assert f"{BIAS} is not finite" in refusal(tmp_path / "x.pt", {**content, "ema": both})


def test_a_claimed_view_larger_than_its_storage_is_refused(tmp_path, content, weights):
    """The pickle says 2^20 elements of a storage that holds 128."""
    buffer = io.BytesIO()
    torch.save({**content, "ema": {"0.999": {**weights, BIAS: torch.zeros(777)}}}, buffer)
    (tmp_path / "good.pt").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        instructions = archive.read(name)
    size = b"M" + struct.pack("<H", 777)  # BININT2, as the pickle writes the one number 777
    assert instructions.count(size) >= 1
    claimed = b"J" + struct.pack("<i", 1 << 20)
    refusal(repacked(tmp_path / "good.pt", tmp_path / "x.pt", {"data.pkl": instructions.replace(size, claimed)}))


def test_a_pickle_of_another_protocol_is_refused_without_warnings(tmp_path: Path) -> None:
    where = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(where, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(print, protocol=4))
        archive.writestr("archive/version", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="pickle that could run code"):
            read_checkpoint(where)
