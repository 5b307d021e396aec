"""What tests read out of run folders: everything that two runs must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def pt(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def left_behind(out: Path) -> dict[str, Any]:
    """All that a run leaves, apart from how long it took and from where it was told to save."""

    def without_times(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: without_times(v) for k, v in node.items() if k not in ("seconds", "images_per_second")}
        if isinstance(node, list | tuple):
            return [without_times(v) for v in node]
        return (node.dtype, node.numpy().tobytes()) if isinstance(node, torch.Tensor) else node

    found: dict[str, Any] = {path.name: without_times(pt(path)) for path in out.glob("[!.]*.pt")}
    found |= {path.name: path.read_bytes() for path in (out / "samples").iterdir()}
    found["log"] = [without_times(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]
    found["config"] = (out / "config.toml").read_text()
    return found


def assert_same(found: dict[str, Any], wanted: dict[str, Any], when: str = "") -> None:
    """Names what differs, and not the bytes of it."""
    assert sorted(found) == sorted(wanted), when
    assert [name for name in wanted if found[name] != wanted[name]] == [], when


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
