"""The Python in README.md runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def blocks() -> list[str]:
    """The ```python blocks that begin with ``import cm_runtime``, in order."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    found = re.findall(r"^```python[^\n]*\n(.*?)^```\s*$", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if block.lstrip().startswith("import cm_runtime")]


def test_the_readme_shows_python() -> None:
    assert blocks(), "README.md has no ```python block that begins with import cm_runtime"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first; a block may use what those before it wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("index", range(len(blocks())))
def test_the_readmes_python_runs(index: int, folder: Path) -> None:
    words = [sys.executable, "-c", blocks()[index]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{blocks()[index]}\n{done.stderr}"
