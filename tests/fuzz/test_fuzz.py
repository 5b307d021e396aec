"""A few mutated files for each reader, in processes with limits; run.py reads as many as one likes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from run import fuzz
from targets import TARGETS

EACH = {"quick": 2, "slow": 10}
GROUPS = 2  # each a process, for as many workers


@pytest.mark.process
@pytest.mark.parametrize("tier", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("group", range(GROUPS))
def test_readers_take_mutated_files_or_refuse_them_in_a_line(group: int, tier: str, tmp_path: Path) -> None:
    """60 inputs in all, and 300 in the slow tier."""
    readers = list(TARGETS)[group::GROUPS]
    assert [str(failure) for failure in fuzz(readers, 0, EACH[tier], tmp_path)] == []
