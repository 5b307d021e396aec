"""A contender in a result, from its samples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cm_runtime.bench import stats
from cm_runtime.bench.contenders import Side
from cm_runtime.bench.results import Contender, Estimate, Peaks, ServerResult
from cm_runtime.bench.scenario import Scenario
from cm_runtime.bench.worker import Block


def contender(side: Side, subject: Side, scenario: Scenario, gflop: float | None, peak: Peaks) -> Contender:
    """The result of a side. gflop: of one evaluation of one image; peak: of its device and threads."""
    is_peer, facts = side.role == "peer", side.facts
    common: dict[str, Any] = {
        "name": side.name,
        "role": side.role,
        "version": "" if facts is None else facts.engine if is_peer else facts.version,
        "commit": side.commit,
        "model_sha256": side.model_sha256,
        "agreement": side.agreement,
        "cold_start_s": () if is_peer else side.cold_start_s,
        "load_s": None if is_peer or facts is None else facts.load_s,
        "micro_batch": None if facts is None else facts.micro_batch,
        "first_s": side.first_s,
    }
    if side.error:
        return Contender(**common, status="absent" if side.error.is_absence else "failed", reason=str(side.error))
    latency = stats.latency(side.blocks)
    if scenario.kind == "server":
        assert scenario.rate is not None and scenario.bound_ms is not None
        high = latency.p99.high if latency.p99 else None
        met = high is not None and high <= scenario.bound_ms
        mean_batch = float(np.mean(side.batches))
        common["served"] = ServerResult(rate=scenario.rate, bound_ms=scenario.bound_ms, met=met, mean_batch=mean_batch)
    else:
        common["images_per_s"] = _rate(side, scenario, latency.p50)
        if side.network_ns is not None:
            total = sum(float(block.sum()) for block in side.blocks)
            common["outside_network"] = max(0.0, 1 - side.network_ns / 1e6 / total)
        if gflop is not None:
            speed = gflop * scenario.steps * scenario.batch / (latency.p50.value / 1e3)
            common |= {"gflop_per_s": speed, "peak_fraction": speed / peak.matrix_gflop_per_s.value}
    return Contender(
        **common,
        status="measured",
        reason=side.reason,
        latency=latency,
        device_latency=stats.latency(side.device_blocks) if side.device_blocks else None,
        time_ratio=None if side is subject else stats.ratio(side.medians, subject.medians),
        peak_host_bytes=None if is_peer else side.peak_host_bytes,
        peak_device_bytes=side.peak_device_bytes,
        warmup=side.warmup,
        stable=side.is_stable,
        block_ms=side.medians,
    )


def _rate(side: Side, scenario: Scenario, p50: Estimate) -> Estimate:
    """Images a second: by the median request; offline, by the mean of a block's."""
    offline = scenario.kind == "offline"
    time_ms = stats.typical([float(block.mean()) for block in side.blocks]) if offline else p50
    images = scenario.batch * 1e3
    return Estimate(
        value=images / time_ms.value,
        low=None if time_ms.high is None else images / time_ms.high,
        high=None if time_ms.low is None else images / time_ms.low,
    )


def line(scenario: str, side: str, number: int, block: Block) -> str:
    """A block's samples as the samples' file keeps them."""
    samples = {name: value for name, value in vars(block).items() if value is not None}
    return json.dumps({"scenario": scenario, "contender": side, "block": number, **samples}) + "\n"
