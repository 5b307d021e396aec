"""The U-Net against the published networks' sizes and names, and the same network written with einsum."""

import math
import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cm_runtime.networks.dropout import Dropout
from cm_runtime.networks.unet import GroupNorm, UNet, UNetConfig, timestep_embedding

IMAGENET_64 = {
    "image_size": 64,
    "image_channels": 3,
    "channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "res_blocks": 3,
    "attention": (32, 16, 8),
    "resample": "resblock",
    "num_classes": 1000,
}
LSUN_256 = {
    "image_size": 256,
    "image_channels": 3,
    "channels": 256,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "res_blocks": 2,
    "attention": (32, 16, 8),
    "resample": "resblock",
    "scale_shift": False,
}
TINY = {
    "image_size": 8,
    "image_channels": 3,
    "channels": 32,
    "channel_mult": (1, 2),
    "res_blocks": 1,
    "head_channels": 32,
}


def tiny(**changes):
    return UNetConfig(**{**TINY, **changes})


# --- the published networks -------------------------------------------------------------------------------------------


def on_paper(config):
    """A network without memory for its weights."""
    with torch.device("meta"):
        return UNet(UNetConfig(**config))


@pytest.fixture(scope="module", params=["imagenet", "lsun"])
def published(request):
    return {"imagenet": (IMAGENET_64, 295_899_267, 541), "lsun": (LSUN_256, 526_304_771, 566)}[request.param]


def test_published_networks_have_their_parameters_and_names(published):
    config, parameters, tensors = published
    names = {name: tuple(tensor.shape) for name, tensor in on_paper(config).state_dict().items()}
    assert len(names) == tensors
    assert sum(math.prod(shape) for shape in names.values()) == parameters

    leaf = r"\.(weight|bias)"
    res = r"(in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection)"
    known = [
        rf"time_embed\.[02]{leaf}",
        r"label_emb\.weight",
        rf"input_blocks\.0\.0{leaf}",
        rf"(input|output)_blocks\.\d+\.0\.{res}{leaf}",
        rf"(input|output)_blocks\.\d+\.1\.(norm|qkv|proj_out){leaf}",
        rf"output_blocks\.\d+\.[12]\.{res}{leaf}",  # the up-blocks
        rf"middle_block\.[02]\.{res}{leaf}",
        rf"middle_block\.1\.(norm|qkv|proj_out){leaf}",
        rf"out\.[02]{leaf}",
    ]
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in known)] == []
    for pattern in known:
        present = any(re.fullmatch(pattern, name) for name in names)
        assert present or (pattern.startswith("label") and "num_classes" not in config), pattern


def blocks_with(state, part):
    """The numbers of the blocks that hold a layer, as {input: [...], output: [...]}."""
    found = {"input": set(), "output": set()}
    for name in state:
        if match := re.fullmatch(rf"(input|output)_blocks\.(\d+)\.{part}\.weight", name):
            found[match[1]].add(int(match[2]))
    return {side: sorted(numbers) for side, numbers in found.items()}


def test_imagenets_blocks_are_where_its_checkpoint_has_them():
    """Three blocks a level and one down: 4, 8, 12. Attention from 32x32 on; up-blocks follow the last of a level."""
    state = on_paper(IMAGENET_64).state_dict()
    assert blocks_with(state, r"1\.qkv") == {
        "input": [5, 6, 7, 9, 10, 11, 13, 14, 15],
        "output": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    }
    assert blocks_with(state, r"2\.in_layers\.2") == {"input": [], "output": [3, 7, 11]}
    assert blocks_with(state, r"1\.in_layers\.2") == {"input": [], "output": []}
    assert blocks_with(state, r"0\.in_layers\.2") == {"input": list(range(1, 16)), "output": list(range(16))}
    assert state["input_blocks.4.0.in_layers.2.weight"].shape == (192, 192, 3, 3)
    assert state["input_blocks.5.0.skip_connection.weight"].shape == (384, 192, 1, 1)
    assert state["output_blocks.0.0.in_layers.2.weight"].shape == (768, 768 + 768, 3, 3)
    assert state["output_blocks.4.0.in_layers.2.weight"].shape == (576, 768 + 576, 3, 3)
    assert state["output_blocks.15.0.in_layers.2.weight"].shape == (192, 192 + 192, 3, 3)
    assert state["input_blocks.1.0.emb_layers.1.weight"].shape == (2 * 192, 768)
    assert state["label_emb.weight"].shape == (1000, 768)


def test_an_up_block_stands_second_where_there_is_no_attention():
    state = on_paper(LSUN_256).state_dict()
    assert blocks_with(state, r"2\.in_layers\.2")["output"] == [2, 5, 8]
    assert blocks_with(state, r"1\.in_layers\.2")["output"] == [11, 14]
    assert state["input_blocks.1.0.emb_layers.1.weight"].shape == (256, 1024)  # added, so no scale beside the shift
    assert "label_emb.weight" not in state


# --- the parts, written out ------------------------------------------------------------------------------------------


def group_norm(x, weight, bias, groups, eps=1e-5):
    n, c, h, w = x.shape
    g = x.reshape(n, groups, -1)
    mean = g.mean(-1, keepdims=True)
    g = (g - mean) / np.sqrt(((g - mean) ** 2).mean(-1, keepdims=True) + eps)
    return g.reshape(n, c, h, w) * weight[:, None, None] + bias[:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))


def conv(x, weight, bias, stride=1):
    """A convolution with zeros around: one einsum over the shifted copies of x."""
    size = weight.shape[-1]
    edge = size // 2
    n, _, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    out = np.zeros((n, len(weight), -(-h // stride), -(-w // stride)))
    for i in range(size):
        for j in range(size):
            seen = padded[:, :, i : i + h : stride, j : j + w : stride]
            out += np.einsum("nchw,oc->nohw", seen, weight[:, :, i, j])
    return out + bias[:, None, None]


def up(x):
    return np.repeat(np.repeat(x, 2, -1), 2, -2)


def down(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def embedding_of(t, dim):
    half = dim // 2
    table = [
        [f(x * math.exp(-math.log(10000) * i / half)) for f in (math.cos, math.sin) for i in range(half)] for x in t
    ]
    return np.pad(np.array(table).reshape(len(t), 2 * half), ((0, 0), (0, dim % 2)))


class Reference:
    """The network in NumPy and float64, walking a state dict by name."""

    def __init__(self, config, state):
        self.config = config
        self.state = {name: tensor.double().numpy() for name, tensor in state.items()}

    def has(self, name):
        return f"{name}.weight" in self.state

    def pair(self, name):
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def norm(self, x, name):
        groups = self.config.norm_groups or math.gcd(32, x.shape[1])
        return group_norm(x, *self.pair(name), groups, self.config.norm_eps)

    def res(self, x, e, name, resample=None):
        h = silu(self.norm(x, f"{name}.in_layers.0"))
        if resample:
            h, x = resample(h), resample(x)
        h = conv(h, *self.pair(f"{name}.in_layers.2"))
        weight, bias = self.pair(f"{name}.emb_layers.1")
        film = (silu(e) @ weight.T + bias)[:, :, None, None]
        if self.config.scale_shift:
            half = film.shape[1] // 2
            h = self.norm(h, f"{name}.out_layers.0") * (1 + film[:, :half]) + film[:, half:]
        else:
            h = self.norm(h + film, f"{name}.out_layers.0")
        h = conv(silu(h), *self.pair(f"{name}.out_layers.3"))
        skip = f"{name}.skip_connection"
        return h + (conv(x, *self.pair(skip)) if self.has(skip) else x)

    def attention(self, x, name):
        n, c, height, width = x.shape
        dim = self.config.head_channels
        heads = c // dim
        qkv = conv(self.norm(x, f"{name}.norm"), *self.pair(f"{name}.qkv")).reshape(n, 3, heads, dim, height * width)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        scores = np.einsum("nhdq,nhdk->nhqk", q, k) / math.sqrt(dim)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        h = np.einsum("nhqk,nhdk->nhdq", scores, v).reshape(n, c, height, width)
        return x + conv(h, *self.pair(f"{name}.proj_out"))

    def __call__(self, x, c_noise, label=None):
        config = self.config
        w0, b0, w2, b2 = *self.pair("time_embed.0"), *self.pair("time_embed.2")
        e = silu(embedding_of(c_noise, config.channels) @ w0.T + b0) @ w2.T + b2
        if label is not None:
            e = e + self.state["label_emb.weight"][label]
        patch = config.patch
        n, c, height, width = x.shape
        if patch == 2:  # channel c, row i, column j of a patch become channel 4c + 2i + j
            x = x.reshape(n, c, height // 2, 2, width // 2, 2).transpose(0, 1, 3, 5, 2, 4)
            x = x.reshape(n, 4 * c, height // 2, width // 2)
        h = conv(x, *self.pair("input_blocks.0.0"))
        skips, number = [h], 1
        for level in range(len(config.channel_mult)):
            for _ in range(config.res_blocks):
                h = self.res(h, e, f"input_blocks.{number}.0")
                if h.shape[-1] in config.attention:
                    h = self.attention(h, f"input_blocks.{number}.1")
                skips.append(h)
                number += 1
            if level < len(config.channel_mult) - 1:
                name = f"input_blocks.{number}.0"
                if config.resample == "conv":
                    h = conv(h, *self.pair(f"{name}.op"), stride=2)
                else:
                    h = self.res(h, e, name, down)
                skips.append(h)
                number += 1
        h = self.res(h, e, "middle_block.0")
        if config.middle_attention:
            h = self.attention(h, "middle_block.1")
        h = self.res(h, e, f"middle_block.{1 + config.middle_attention}")
        number = 0
        for level in reversed(range(len(config.channel_mult))):
            for i in range(config.res_blocks + 1):
                h = self.res(np.concatenate([h, skips.pop()], 1), e, f"output_blocks.{number}.0")
                second = 1
                if h.shape[-1] in config.attention:
                    h = self.attention(h, f"output_blocks.{number}.1")
                    second = 2
                if level and i == config.res_blocks:
                    name = f"output_blocks.{number}.{second}"
                    if config.resample == "conv":
                        h = conv(up(h), *self.pair(f"{name}.conv"))
                    else:
                        h = self.res(h, e, name, up)
                number += 1
        h = conv(silu(self.norm(h, "out.0")), *self.pair("out.2"))
        if patch == 2:
            h = h.reshape(n, c, 2, 2, height // 2, width // 2).transpose(0, 1, 4, 2, 5, 3).reshape(n, c, height, width)
        return h


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": (8,), "head_channels": 8},
        {"resample": "resblock", "attention": (4, 8), "head_channels": 16, "num_classes": 7},
        {"scale_shift": False, "resample": "resblock"},
        {"scale_shift": False, "attention": (4,), "num_classes": 3},
        {"patch": 2, "image_channels": 1},
        {"patch": 2, "resample": "resblock", "attention": (4,), "num_classes": 1},
        {"channel_mult": (1,), "image_size": 7, "attention": (7,)},
        {"channel_mult": (1,), "image_size": 3, "image_channels": 7, "res_blocks": 3},
        {"channel_mult": (1,), "image_size": 1, "image_channels": 1},
        {"channels": 7, "head_channels": 7, "channel_mult": (1, 3)},
        {"channels": 24, "head_channels": 12, "channel_mult": (2, 1), "res_blocks": 2, "image_size": 12},
        {"middle_attention": False, "head_channels": 24, "norm_groups": 4, "norm_eps": 1e-2},
        {"middle_attention": False, "attention": (8,), "norm_groups": 1, "channels": 7, "head_channels": 7},
    ],
    ids=str,
)
def test_the_network_is_the_one_written_out(changes, rng, randomised):
    config = tiny(**changes)
    network = randomised(UNet(config))
    size = config.image_size
    x = rng.standard_normal((3, config.image_channels, size, size)).astype(np.float32)
    c_noise = np.array([-1553.65, 0.0, 1095.5], np.float32)
    label = rng.integers(0, config.num_classes, 3) if config.num_classes else None
    expected = Reference(config, network.state_dict())(x.astype(np.float64), c_noise.astype(np.float64), label)
    with torch.no_grad():
        as_tensors = [
            torch.from_numpy(x),
            torch.from_numpy(c_noise),
            None if label is None else torch.from_numpy(label),
        ]
        single = network(*as_tensors)
    assert single.dtype == torch.float32 and single.shape == x.shape
    scale = np.abs(expected).max()
    assert scale > 0.05  # random weights, so nothing is silent
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-4 * scale)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_reads_three_heads_dim_and_not_heads_three_dim(heads, rng, randomised):
    from cm_runtime.networks.unet import AttentionBlock

    block = randomised(AttentionBlock(12 * heads, tiny(head_channels=12, channels=12)))
    x = rng.standard_normal((3, 12 * heads, 3, 7))
    reference = Reference(tiny(head_channels=12, channels=12), {})
    reference.state = {f"a.{name}": tensor.double().numpy() for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        found = block(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found, reference.attention(x, "a"), atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 32, 255])
def test_timestep_embedding_is_cosines_then_sines(dim):
    t = [-1553.652, 0.0, 1.0, 1095.5067]
    found = timestep_embedding(torch.tensor(t), dim)
    assert found.shape == (4, dim) and found.dtype == torch.float32
    expected = embedding_of(torch.tensor(t).double().tolist(), dim)
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-4)  # float32 angles up to 1600


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (64, 32), (48, 16), (7, 1), (3, 1), (255, 1), (24, 8)])
def test_group_norm_has_32_groups_or_what_divides(channels, groups, rng):
    norm = GroupNorm(channels, tiny())
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, channels))
        norm.bias.copy_(torch.linspace(-1, 1, channels))
    x = (5 + 3 * rng.standard_normal((3, channels, 3, 7))).astype(np.float32)
    weight, bias = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    expected = group_norm(x.astype(np.float64), weight, bias, groups)
    np.testing.assert_allclose(norm(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-5)


def test_group_norms_statistics_are_float32_for_halves(rng):
    """60000^2 does not fit in a half: only float32 statistics survive."""
    norm = GroupNorm(32, tiny())
    x = torch.from_numpy(60000 * rng.uniform(0.9, 1, (3, 32, 7, 7))).half()
    found = norm(x)
    assert found.dtype == torch.float16
    expected = group_norm(x.double().numpy(), np.ones(32), np.zeros(32), 32)
    np.testing.assert_allclose(found.detach().float().numpy(), expected, atol=2e-3)


def test_a_fresh_network_is_silent():
    """Its last convolution starts at zero, so f starts as c_skip x."""
    network = UNet(tiny(num_classes=3))
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        assert (network(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64)) == 0).all()


def test_images_do_not_see_each_other(rng, randomised):
    network = randomised(UNet(tiny(num_classes=7, attention=(8, 4))))
    x = torch.from_numpy(rng.standard_normal((7, 3, 8, 8))).float()
    c_noise, label = torch.linspace(-1000, 1000, 7), torch.arange(7)
    with torch.no_grad():
        together = network(x, c_noise, label)
        for i in (0, 3, 6):
            alone = network(x[i : i + 1], c_noise[i : i + 1], label[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)


def test_dropout_is_heard_in_training_only(rng, randomised):
    network = randomised(UNet(tiny(dropout=0.5)))
    x, c_noise = torch.from_numpy(rng.standard_normal((1, 3, 8, 8))).float(), torch.zeros(1)
    with torch.no_grad():
        assert torch.equal(network(x, c_noise), network(x, c_noise))
        network.train()
        assert not torch.equal(network(x, c_noise), network(x, c_noise))


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 64},
        {"channel_mult": (1, 3)},
        {"res_blocks": 2},
        {"attention": (8,)},
        {"head_channels": 16},
        {"scale_shift": False},
        {"resample": "resblock"},
        {"middle_attention": False},
        {"norm_groups": 8},
        {"norm_eps": 0.1},
        {"patch": 2},
        {"num_classes": 3},
        {"image_channels": 1},
    ],
    ids=str,
)
def test_every_choice_changes_the_network(changes, rng, randomised):
    """The names, the shapes, or what the same weights compute."""
    plain, other = randomised(UNet(tiny())), randomised(UNet(tiny(**changes)))
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (plain, other)]
    if shapes[0] == shapes[1]:
        x = torch.from_numpy(rng.standard_normal((1, 3, 8, 8))).float()
        with torch.no_grad():
            assert (plain(x, torch.ones(1)) - other(x, torch.ones(1))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image_size": 7}, "image_size 7 must be a multiple of 2"),
        ({"image_size": 255}, "image_size 255 must be a multiple of 2"),
        ({"image_size": 6, "channel_mult": (1, 1, 1)}, "image_size 6 must be a multiple of 4"),
        ({"image_size": 6, "patch": 2}, "image_size 6 must be a multiple of 4"),
        ({"image_size": 3, "patch": 2, "channel_mult": (1,)}, "image_size 3 must be a multiple of 2"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 4097}, "image_size"),
        ({"image_channels": 0}, "image_channels"),
        ({"channels": 0}, "channels"),
        ({"channels": -32}, "channels"),
        ({"channels": 32.5}, "channels"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult must be from 1 to 64"),
        ({"channel_mult": (1, -2)}, "channel_mult must be from 1 to 64"),
        ({"channel_mult": (1,) * 9}, "channel_mult"),
        ({"res_blocks": 0}, "res_blocks"),
        ({"attention": (16,)}, r"attention at \[16\], but the feature maps are \[8, 4\]"),
        ({"attention": (8,), "patch": 2}, r"attention at \[8\], but the feature maps are \[4, 2\]"),
        ({"head_channels": 0}, "head_channels"),
        ({"head_channels": 24}, "64 channels do not split into heads of 24"),
        ({"head_channels": 64, "attention": (8,)}, "32 channels do not split into heads of 64"),
        ({"norm_groups": 5}, "channels 32 do not split into norm_groups 5"),
        ({"norm_groups": 0}, "norm_groups"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"resample": "bilinear"}, "resample"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"patch": 4}, "patch"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 1_000_001}, "num_classes"),
        ({"depth": 3}, "depth"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused_by_name(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        tiny(**changes)


def test_the_order_of_attention_sizes_does_not_matter():
    assert tiny(attention=(4, 8, 4)) == tiny(attention=(8, 4))


# --- dropout ----------------------------------------------------------------------------------------------------------


def keys_of(*numbers):
    """A key for each number: words of 32 bits."""
    words = [np.random.Generator(np.random.Philox(number)).integers(0, 1 << 32, 2) for number in numbers]
    return torch.from_numpy(np.array(words, np.int64))


def kept(p, key, layer=0, elements=(4, 25, 100)):
    """Which elements a layer keeps: (N, *elements) bool."""
    return Dropout(p, layer).train()(torch.ones(len(key), *elements, dtype=torch.float64), key) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    key = keys_of(*range(20))
    found = Dropout(p, 3).train()(torch.ones(20, 4, 25, 100, dtype=torch.float64), key)
    n = found.numel()
    dropped = (found == 0).sum().item()
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert found.unique().tolist() == [0, pytest.approx(1 / (1 - p), rel=1e-15)]
    assert found.mean().item() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / n))
    per_image = (found == 0).double().flatten(1).sum(1)
    assert (per_image - 10_000 * p).abs().max() < 5 * math.sqrt(10_000 * p * (1 - p))


def test_dropouts_mask_is_its_printed_hash():
    """lowbias32 (C. Wellons) in Python integers, which do not wrap."""
    word = 0xFFFFFFFF

    def lowbias32(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & word
        x = ((x ^ (x >> 15)) * 0x846CA68B) & word
        return x ^ (x >> 16)

    key, layer, p = keys_of(5, 6), 7, 0.3
    wanted = []
    for k0, k1 in key.tolist():
        bits = [(e * 0x9E3779B1 + layer) & word for e in range(255)]
        hashed = [lowbias32((lowbias32(b ^ k0) + k1) & word) for b in bits]
        # as a signed number, counted from the lowest
        wanted.append([(value + 2**31) & word >= int(p * 2**32) for value in hashed])
    assert kept(p, key, layer, (255,)).tolist() == wanted


def test_an_images_mask_is_the_same_in_every_batch():
    whole = kept(0.5, keys_of(*range(12)), layer=4)
    for some in ([3], [11, 0, 5], [7, 7]):
        assert torch.equal(kept(0.5, keys_of(*some), layer=4), whole[some])
    channels_last = torch.ones(12, 4, 25, 100).to(memory_format=torch.channels_last)
    assert torch.equal(Dropout(0.5, 4).train()(channels_last, keys_of(*range(12))) != 0, whole)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_of_other_keys_layers_and_elements_are_independent(p):
    key = keys_of(*range(8))
    flipped = key.clone()
    flipped[:, 0] ^= 1 << 20  # keys that differ in one bit
    masks = [kept(p, key, layer) for layer in (0, 1, 2, 1000)]
    masks += [kept(p, other) for other in (flipped, key.flip(1), keys_of(*range(8, 16)), key.roll(1, 0))]
    flat = torch.stack([mask.flatten() for mask in masks])
    shifted = torch.stack([flat[0].roll(by) for by in (1, 2, 25, 100, 2500, 10_000)])  # neighbours and channels
    correlation = np.corrcoef(torch.cat([flat, shifted]).double().numpy()) - np.eye(len(flat) + len(shifted))
    # key.roll is the masks of other images, moved: row 7 is row 0 rolled by an image, which shifted[-1] is, too
    correlation[[7, 13], [13, 7]] = 0
    assert np.abs(correlation).max() < 5 / math.sqrt(80_000)


def test_dropout_without_a_key_is_torchs():
    h = torch.ones(3, 1000)
    layer = Dropout(0.5, 0).train()
    torch.manual_seed(0)
    found = layer(h)
    torch.manual_seed(0)
    assert torch.equal(found, torch.nn.functional.dropout(h, 0.5))
    assert not torch.equal(layer(h), found)


def test_dropout_does_nothing_in_evaluation_or_where_p_is_zero():
    h, key = torch.randn(3, 7), keys_of(0, 1, 2)
    assert torch.equal(Dropout(0.5, 0).eval()(h, key), h)
    assert torch.equal(Dropout(0.0, 0).train()(h, key), h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dropout_keeps_the_type_of_what_it_drops(dtype):
    key = keys_of(0, 1)
    found = Dropout(0.5, 0).train()(torch.ones(2, 99, dtype=dtype), key)
    assert found.dtype == dtype and torch.equal(found != 0, kept(0.5, key, elements=(99,)))


def test_every_layer_of_a_network_has_a_number_of_its_own():
    network = UNet(tiny(dropout=0.5, resample="resblock"))
    layers = [module.layer for module in network.modules() if isinstance(module, Dropout)]
    assert len(layers) > 8 and len(set(layers)) == len(layers)


def test_a_networks_masks_follow_the_images_and_not_their_batch(rng, randomised):
    network = randomised(UNet(tiny(dropout=0.5))).double().train()
    x, key = torch.from_numpy(rng.standard_normal((5, 3, 8, 8))), keys_of(*range(5))
    c_noise = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        together = network(x, c_noise, None, key)
        alone = network(x[3:4], c_noise[3:4], None, key[3:4])
        other = network(x[3:4], c_noise[3:4], None, key[2:3])
    assert together.dtype == torch.float64
    torch.testing.assert_close(alone, together[3:4], rtol=1e-11, atol=1e-11)
    assert (alone - other).abs().max() > 1e-3
