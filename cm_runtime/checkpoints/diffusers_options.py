"""The options of diffusers' UNet2DModel and CMStochasticIterativeScheduler in our terms, and ours in theirs.

Options that have no place in our network are refused by their names, all of them at once.
Source: diffusers 0.42, models/unets/unet_2d.py and schedulers/scheduling_consistency_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cm_runtime.checkpoints.native import build_network
from cm_runtime.errors import CheckpointError
from cm_runtime.errors.wording import join_words, quantity
from cm_runtime.networks.consistency import ModelConfig
from cm_runtime.networks.unet import GroupNorm, UNet, UNetConfig
from cm_runtime.schedule import GRID_LIMIT

# Every option of a UNet2DModel with its default, which older files leave out.
OPTIONS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of embeddings that are learned, which ours are not
}
FIXED = (
    "center_input_sample",
    "time_embedding_type",
    "freq_shift",
    "flip_sin_to_cos",
    "mid_block_type",
    "mid_block_scale_factor",
    "class_embed_type",
)

SCHEDULER = "CMStochasticIterativeScheduler"
SCHEDULER_OPTIONS: dict[str, Any] = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "s_noise": 1.0,
    "rho": 7.0,
    "clip_denoised": True,
}

RESAMPLED = {"conv": "conv", "resnet": "resblock"}  # their word: ours
DOWN = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet", "AttnDownBlock2D": None}
UP = {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet", "AttnUpBlock2D": None}  # None: the model's option says


class Unmapped:
    """The options of a configuration that have no counterpart, gathered while it is read."""

    def __init__(self, what: str, options: int) -> None:
        """what: whose options they are; options: how many the configuration has."""
        self._what, self._options, self._complaints = what, options, dict[str, str]()

    def add(self, option: str, value: Any, possible: str) -> None:
        """An option, its value, and what alone would be possible."""
        self._complaints.setdefault(option, f"{option} {str(value)[:200]}: {possible}")

    def check(self) -> None:
        """Raises CheckpointError naming every option that was added."""
        if self._complaints:
            names = "; ".join(self._complaints.values())
            share = f"{len(self._complaints)} of {quantity(self._options, 'option')}"
            verb = "has" if len(self._complaints) == 1 else "have"
            raise CheckpointError(f"{share} {verb} no counterpart in cm-runtime's {self._what}: {names}")


def network_of(content: Mapping[str, Any]) -> UNetConfig:
    """Our network for a UNet2DModel's config.json; raises CheckpointError naming the options that have no place."""
    config = _options(content, OPTIONS, "UNet2DModel")
    unmapped = Unmapped("UNet", len(config))
    for option in FIXED:
        if config[option] != OPTIONS[option]:
            unmapped.add(option, config[option], f"only {OPTIONS[option]}")
    if config["act_fn"] not in ("silu", "swish"):
        unmapped.add("act_fn", config["act_fn"], "only silu")
    if config["in_channels"] != config["out_channels"]:
        unmapped.add("out_channels", config["out_channels"], f"only as many as in_channels, {config['in_channels']}")
    size = config["sample_size"]
    if isinstance(size, list) and len(set(map(str, size))) == 1:
        size = size[0]
    if not isinstance(size, int):
        unmapped.add("sample_size", size, "only the side of a square in pixels")
    if config["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        unmapped.add("resnet_time_scale_shift", config["resnet_time_scale_shift"], "only default or scale_shift")
    groups = _norm_groups(config, unmapped)
    widths = config["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(type(w) is int and w > 0 for w in widths):
        unmapped.add("block_out_channels", widths, "only a list of whole numbers")
        unmapped.check()
    if (odd := next((w for w in widths if w % widths[0]), None)) is not None:
        unmapped.add("block_out_channels", widths, f"only multiples of the first, and {odd} is none")
    if config["time_embedding_dim"] not in (None, 4 * widths[0]):
        unmapped.add("time_embedding_dim", config["time_embedding_dim"], f"only {4 * widths[0]}")
    attended, resample = _levels(config, len(widths), unmapped)
    head_channels = _head_channels(config, attended, unmapped)
    unmapped.check()
    network = build_network(
        image_size=size,
        image_channels=config["in_channels"],
        num_classes=config["num_class_embeds"] or 0,
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        res_blocks=config["layers_per_block"],
        attention=tuple(size >> level for level, there in enumerate(attended) if there),
        middle_attention=config["add_attention"],
        head_channels=head_channels,
        scale_shift=config["resnet_time_scale_shift"] == "scale_shift",
        resample=RESAMPLED[resample],
        norm_groups=groups,
        norm_eps=config["norm_eps"],
        dropout=config["dropout"],
    )
    # One network, one config: where the default's groups are these, the default it is.
    plain = network.model_copy(update={"norm_groups": None})
    return plain if groups_of(plain) == {config["norm_num_groups"]} else network


def unet2d_of(network: UNetConfig) -> dict[str, Any]:
    """A UNet2DModel's config.json for our network; raises CheckpointError with the reason where there is none."""
    if network.patch != 1:
        raise CheckpointError(f"diffusers' UNet2DModel cannot unshuffle pixels, as patch {network.patch} does")
    if network.channel_mult[0] != 1:
        raise CheckpointError(
            f"diffusers' UNet2DModel embeds the noise level in as many channels as the outermost level has, and this"
            f" network's channel_mult begins with {network.channel_mult[0]}"
        )
    groups = groups_of(network)
    if len(groups) > 1:
        raise CheckpointError(
            f"diffusers' UNet2DModel has one norm_num_groups, and this network's normalisations have {sorted(groups)}"
        )
    last = len(network.channel_mult) - 1
    attended = [network.image_size >> level in network.attention for level in range(last + 1)]
    plain, resampled = ("", "conv") if network.resample == "conv" else ("Resnet", "resnet")
    down = ["AttnDownBlock2D" if there else f"{plain}Down{'sample' if plain else ''}Block2D" for there in attended]
    up = ["AttnUpBlock2D" if there else f"{plain}Up{'sample' if plain else ''}Block2D" for there in attended[::-1]]
    return {
        **OPTIONS,
        "_class_name": "UNet2DModel",
        "sample_size": network.image_size,
        "in_channels": network.image_channels,
        "out_channels": network.image_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": [network.channels * mult for mult in network.channel_mult],
        "layers_per_block": network.res_blocks,
        "downsample_type": resampled,
        "upsample_type": resampled,
        "dropout": network.dropout,
        "attention_head_dim": network.head_channels,
        "norm_num_groups": max(groups),
        "attn_norm_num_groups": max(groups),
        "norm_eps": network.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
        "add_attention": network.middle_attention,
        "num_class_embeds": network.num_classes or None,
    }


def sampler_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """{num_train_timesteps, sigma_min, sigma_max, sigma_data, rho} of a scheduler_config.json.

    Raises CheckpointError for another scheduler, or one whose images our sampler would not draw.
    """
    if content.get("_class_name") != SCHEDULER:
        raise CheckpointError(
            f"its scheduler is {content.get('_class_name')}, not that of consistency models, {SCHEDULER}"
        )
    config = _options(content, SCHEDULER_OPTIONS, SCHEDULER)
    unmapped = Unmapped("sampler", len(config))
    for option in ("s_noise", "clip_denoised"):
        if config[option] != SCHEDULER_OPTIONS[option]:
            unmapped.add(option, config[option], f"only {SCHEDULER_OPTIONS[option]}")
    N = config["num_train_timesteps"]
    if not isinstance(N, int) or not 2 <= N <= GRID_LIMIT:
        unmapped.add("num_train_timesteps", N, f"only a whole number from 2 to {GRID_LIMIT}")
    for option in SCHEDULER_OPTIONS.keys() - {"clip_denoised"}:
        if isinstance(config[option], bool) or not isinstance(config[option], int | float):
            unmapped.add(option, config[option], "only a number")
    unmapped.check()
    return {option: config[option] for option in config if option not in ("s_noise", "clip_denoised")}


def scheduler_of(config: ModelConfig, num_train_timesteps: int) -> dict[str, Any]:
    """A scheduler_config.json for our model; raises CheckpointError with the reason where there is none."""
    if config.precond != "boundary":
        raise CheckpointError(
            f"diffusers' {SCHEDULER} has the boundary form alone, and this model the {config.precond} form"
        )
    if config.sigma_boundary != config.sigma_min:
        raise CheckpointError(
            f"diffusers' {SCHEDULER} has its boundary at sigma_min, and this model's are {config.sigma_boundary:g} and"
            f" {config.sigma_min:g}"
        )
    return {
        **SCHEDULER_OPTIONS,
        "_class_name": SCHEDULER,
        "num_train_timesteps": num_train_timesteps,
        "sigma_min": config.sigma_min,
        "sigma_max": config.sigma_max,
        "sigma_data": config.sigma_data,
        "rho": config.rho,
    }


def groups_of(network: UNetConfig) -> set[int]:
    """The numbers of groups of the network's normalisations."""
    with torch.device("meta"):
        return {module.num_groups for module in UNet(network).modules() if isinstance(module, GroupNorm)}


def _options(content: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """``content`` over the defaults; those with an underscore are diffusers' own notes."""
    options = {key: value for key, value in content.items() if not key.startswith("_")}
    if unknown := options.keys() - defaults.keys():
        verb = "are no options" if len(unknown) > 1 else "is no option"
        raise CheckpointError(f"{join_words(sorted(unknown))} {verb} of {what} that cm-runtime knows")
    return {**defaults, **options}


def _levels(config: Mapping[str, Any], count: int, unmapped: Unmapped) -> tuple[list[bool], str]:
    """Attention by level, outermost first, and the resampling of all levels in diffusers' word."""
    attended: dict[str, list[bool]] = {}
    resamplers: set[str] = set()
    for option, kinds, default in (
        ("down_block_types", DOWN, "downsample_type"),
        ("up_block_types", UP, "upsample_type"),
    ):
        names = config[option]
        if not isinstance(names, list) or len(names) != count:
            unmapped.add(option, names, f"only a list as long as block_out_channels, {count}")
            continue
        plain = [str(name).removeprefix("UNetRes") for name in names]
        if unknown := [name for name in plain if name not in kinds]:
            unmapped.add(option, join_words(list(dict.fromkeys(unknown))), f"only {', '.join(kinds)}")
            continue
        resamplers |= {kinds[name] or str(config[default]) for name in plain[: count - 1] or plain}
        attended[option] = [kinds[name] is None for name in plain]
    if len(attended) < 2:
        return [False] * count, "conv"
    if attended["down_block_types"] != attended["up_block_types"][::-1]:
        unmapped.add("up_block_types", config["up_block_types"], "only with attention where down_block_types have it")
    if len(resamplers) > 1 or not resamplers <= RESAMPLED.keys():
        mixed = " and ".join(sorted(resamplers))
        unmapped.add("down_block_types, downsample_type, upsample_type", mixed, "only conv or only resnet")
    resample = min(resamplers)
    if resample == "conv" and count > 1 and config["downsample_padding"] != 1:
        unmapped.add("downsample_padding", config["downsample_padding"], "only 1")
    return attended["down_block_types"], resample


def _head_channels(config: Mapping[str, Any], attended: list[bool], unmapped: Unmapped) -> int:
    """Channels of a head in every attention; a null option means one head of all channels."""
    if config["attention_head_dim"] is not None:
        return config["attention_head_dim"]  # type: ignore[no-any-return]
    widths = config["block_out_channels"]
    used = {width for width, there in zip(widths, attended, strict=True) if there}
    used |= {widths[-1]} if config["add_attention"] else set()
    if len(used) > 1:
        possible = f"only where all attention has the same channels, not {sorted(used)}"
        unmapped.add("attention_head_dim", None, possible)
    return min(used) if used else widths[0]  # type: ignore[no-any-return]


def _norm_groups(config: Mapping[str, Any], unmapped: Unmapped) -> Any:
    groups = config["norm_num_groups"]
    if not isinstance(groups, int):
        unmapped.add("norm_num_groups", groups, "only a whole number")
        return groups
    # Without a number of its own, the middle attention has no norm at all beside scale_shift.
    default = groups if config["resnet_time_scale_shift"] == "default" else None
    in_the_middle = config["attn_norm_num_groups"] or default
    if config["add_attention"] and in_the_middle != groups:
        unmapped.add("attn_norm_num_groups", config["attn_norm_num_groups"], f"only {groups}, as norm_num_groups")
    return groups
