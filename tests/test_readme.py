"""The Python in README.md runs as it stands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_runtime.cli import main

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


@pytest.mark.process
@pytest.mark.parametrize("index", range(len(blocks())))
def test_the_readmes_python_runs(index: int, folder: Path) -> None:
    words = [sys.executable, "-c", blocks()[index]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{blocks()[index]}\n{done.stderr}"


def edits() -> list[str]:
    """The commands under "Edit images" that edit the pictures beside the strips."""
    text = README.read_text(encoding="utf-8")
    return re.findall(r"^    cm-runtime (edit .*?)(?: +#.*)?$", text, re.MULTILINE)


@pytest.mark.process
@pytest.mark.parametrize("command", edits())
def test_the_readmes_edits_run_and_its_strips_are_theirs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a grey level or so: engines and processors round differently, and a step may widen it."""
    there = ROOT / "benchmarks" / "results" / "editing"
    words = shlex.split(command)
    strip = words[words.index("-o") + 1]
    for file in there.iterdir():
        if file.name != strip:
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    made, shown = (np.asarray(Image.open(folder / strip)).astype(int) for folder in (tmp_path, there))
    assert np.abs(made - shown).mean() < 0.1


def test_the_readme_shows_each_edit() -> None:
    assert {command.split()[1] for command in edits()} == {"inpaint", "superres", "stroke", "denoise", "interpolate"}
