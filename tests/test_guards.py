"""What no single module can promise: the import order, no torch on the sampling path, a light --help, public names."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

import cm_runtime as cm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cm_runtime"

# A file imports only from its left. Nothing imports the face (__init__.py, __main__.py), which may import everything.
ORDER = """
    choices, errors < files < extras, subprocesses < schedule, precond, noise, projections, manifest < onnx_graph
    < request < sampling < editing < networks < checkpoints < kernels < cuda < backends < generation
    < evaluate < training < export < bench < cli
"""
PLACES = ORDER.replace("<", " ").replace(",", " ").split()
FACE = {"", "__main__"}
USERS = {"bench.worker"}  # a program that runs other builds as their users do
# These need torch, so the others import them inside functions only, where the missing extra has been reported.
TORCH = {
    "networks",
    "checkpoints",
    "training",
    "export",
    "backends.torch",
    "backends.torch_layers",
    "backends.torch_settings",
    "backends.torch_stream",
    "backends.torch_unet",
    "cuda.torch_launch",
    "cuda.torch_ops",
    "generation.torch_dataset",
}
# Third-party packages at module level: what a bare install brings, what the [train] extra adds, and the command line,
# which imports our modules as well as others' inside functions only, errors apart: --help is to be quick.
BASE = {"numpy", "PIL", "pydantic", "rich", "typer"}
WITH_TORCH = BASE | {"torch", "onnx"}
COMMAND_LINE = {"typer"}

PUBLIC = ["Draw", "editing", "errors", "export", "load", "load_checkpoint", "noise", "sample", "stream"]


# The import order


class Import(NamedTuple):
    """A dotted name that a file imports: when it is loaded, when a function runs, or for type checkers only."""

    name: str
    line: int
    when: Literal["load", "call", "types"]


def modules(package: Path) -> dict[str, Path]:
    """The file of every module, named from inside the package ("backends.ort"; "" is the package itself)."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            parts = file.relative_to(package).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(node: ast.AST, parent: list[str], when: Literal["load", "call", "types"] = "load") -> Iterator[Import]:
    """All imports under ``node``, absolute; ``parent``: the package of the file, for relative ones."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = parent[: len(parent) + 1 - child.level] if child.level else []
            path = [*base, *([child.module] if child.module else [])]
            yield from (Import(".".join([*path, alias.name]), child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, parent, "call")
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from imports(ast.Module(child.body, []), parent, "types")
            yield from imports(ast.Module(child.orelse, []), parent, when)
        else:
            yield from imports(child, parent, when)


def violations(package: Path) -> list[str]:
    """One line for each import under ``package`` that the rules above forbid."""
    files = modules(package)
    lines = []
    for module, file in files.items():
        if module in FACE | USERS:
            continue
        top = module.split(".")[0]
        if top not in PLACES:
            lines.append(f"{module}: has no place in the import order")
            continue
        parent = [package.name, *module.split(".")][: None if file.name == "__init__.py" else -1]
        for found in imports(ast.parse(file.read_text()), parent):
            root, _, rest = found.name.partition(".")
            wrong = (
                _forbidden(module, top, found, rest, files) if root == package.name else _foreign(top, module, found)
            )
            if wrong:
                lines.append(f"{module}:{found.line}: {wrong}")
    return lines


def _forbidden(module: str, top: str, found: Import, rest: str, files: dict[str, Path]) -> str | None:
    """Why ``module`` may not import ``rest`` of our own package, or None."""
    if rest == "__version__":
        return None
    parts = rest.split(".")
    target = next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in files), "")
    place = target.split(".")[0]
    if target in FACE:
        return f"imports {rest or 'the package'} from the face, not from its home"
    if place not in PLACES:
        return f"imports {target}, which has no place in the import order"
    if place != top and PLACES.index(place) > PLACES.index(top):
        return f"imports {target}, which stands to its right"
    if found.when == "load" and _needs_torch(target) and not _needs_torch(module) and top != "cli":
        return f"imports {target}, which needs torch, outside a function"
    if found.when == "load" and top == "cli" and place not in ("choices", "errors", "cli"):
        return f"imports {target} outside a function"
    return None


def _foreign(top: str, module: str, found: Import) -> str | None:
    """Why ``module`` may not import somebody else's package there, or None."""
    name = found.name.split(".")[0]
    allowed = COMMAND_LINE if top == "cli" else WITH_TORCH if _needs_torch(module) else BASE
    if found.when != "load" or name in sys.stdlib_module_names or name in allowed:
        return None
    return f"imports {name} outside a function"


def _needs_torch(module: str) -> bool:
    return module in TORCH or module.split(".")[0] in TORCH


@pytest.mark.process
def test_files_import_only_from_their_left() -> None:
    """No import in the package breaks the order, or brings torch where none is needed."""
    assert violations(PACKAGE) == []


def arrows(package: Path) -> set[tuple[str, str]]:
    """Imports between rooms, a room being a module of the root or a folder of it."""
    files = modules(package)
    pairs = set()
    for module, file in files.items():
        parent = [package.name, *module.split(".")][: None if file.name == "__init__.py" else -1]
        for each in imports(ast.parse(file.read_text()), parent):
            root, _, rest = each.name.partition(".")
            if module not in FACE and root == package.name and rest.split(".")[0] in PLACES:
                pairs.add((module.split(".")[0], rest.split(".")[0]))
    return {(room, other) for room, other in pairs if room != other}


def test_the_root_is_the_paper_and_rooms_are_few() -> None:
    """43 rooms, 34 modules in the root and 244 arrows before there were rooms. A new one wants a reason."""
    assert sum(1 for _ in PACKAGE.glob("*.py")) <= 13
    assert len({name.split(".")[0] for name in modules(PACKAGE)} - FACE) <= 25
    assert len(arrows(PACKAGE)) <= 150


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A package with an empty module at every place of the order."""
    package = tmp_path / "cm_runtime"
    for name in [".", *PLACES]:
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    for name in ("backends/ort", "backends/torch", "cli/sample", "export/parity", "training/loop"):
        (package / f"{name}.py").touch()
    return package


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("noise/__init__.py", "from cm_runtime.sampling import run", "imports sampling, which stands to its right"),
        ("noise/__init__.py", "from ..sampling import run", "imports sampling, which stands to its right"),
        ("noise/__init__.py", "from .. import sampling", "imports sampling, which stands to its right"),
        ("noise/__init__.py", "def f():\n import cm_runtime.cli.sample", "imports cli.sample, which stands to its"),
        ("schedule/__init__.py", "from cm_runtime import precond", "imports precond, which stands to its right"),
        (
            "errors/__init__.py",
            "if TYPE_CHECKING:\n from cm_runtime.files import f",
            "imports files, which stands",
        ),
        ("sampling/__init__.py", "try:\n import cm_runtime.bench\nfinally: pass", "imports bench, which stands"),
        (
            "backends/ort.py",
            "from cm_runtime.checkpoints import native",
            "imports checkpoints, which needs",
        ),
        ("backends/ort.py", "from . import torch", "imports backends.torch, which needs torch, outside a function"),
        ("bench/__init__.py", "class A:\n from cm_runtime.training import loop", "imports training.loop, which needs"),
        ("cli/sample.py", "from cm_runtime import sampling", "imports sampling outside a function"),
        ("cli/sample.py", "import numpy as np", "imports numpy outside a function"),
        ("cli/sample.py", "if TYPE_CHECKING: pass\nelse:\n import rich.progress", "imports rich outside a function"),
        ("backends/ort.py", "import onnxruntime", "imports onnxruntime outside a function"),
        ("sampling/__init__.py", "if SPEED:\n from torch import nn", "imports torch outside a function"),
        ("training/loop.py", "import pooch", "imports pooch outside a function"),
        ("sampling/__init__.py", "from cm_runtime import load", "imports load from the face"),
        ("sampling/__init__.py", "import cm_runtime", "imports the package from the face"),
        ("utils.py", "", "has no place in the import order"),
    ],
)
def test_a_planted_import_is_found(planted: Path, file: str, source: str, complaint: str) -> None:
    """Each rule has an import that breaks it."""
    (planted / file).write_text(source)
    (line,) = violations(planted)
    assert complaint in line
    assert line.startswith(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from cm_runtime.cli import main"),
        ("manifest/__init__.py", "import json, numpy.typing\nfrom cm_runtime.precond import Form"),
        ("backends/__init__.py", "def f():\n from cm_runtime.backends.torch import g\n import torch"),
        ("backends/__init__.py", "if TYPE_CHECKING:\n from cm_runtime.checkpoints.native import Checkpoint"),
        ("backends/torch.py", "import torch\nfrom cm_runtime.networks.consistency import ConsistencyModel"),
        ("export/parity.py", "import onnx\nfrom cm_runtime.training.loop import train\nfrom . import onnx"),
        ("cli/sample.py", "import typer\nfrom cm_runtime.cli import app\nfrom cm_runtime.errors import RequestError"),
        ("cli/sample.py", "async def f():\n import torch\n from cm_runtime import __version__, training"),
    ],
)
def test_other_imports_are_left_alone(planted: Path, file: str, source: str) -> None:
    """What the order allows."""
    (planted / file).write_text(source)
    assert violations(planted) == []


# No torch


# A bare install with the [cpu] extra: what else a development environment holds cannot be imported.
WITHOUT_TRAIN = """
import importlib, sys

class Missing:
    asked = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "openvino", "pooch", "scipy", "tomli_w"}:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this checkout; its output is part of a failure's message."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.process
def test_without_torch_every_other_module_loads() -> None:
    """All but the torch modules, the sampling path and the command line among them."""
    names = [name for name in modules(PACKAGE) if not _needs_torch(name) and name != "__main__"]
    assert {"", "sampling", "files.image_writer", "backends", "backends.ort", "cli", "cli.sample"} <= set(names)
    loads = [f"importlib.import_module({f'cm_runtime.{name}'.rstrip('.')!r})" for name in names]
    python("-c", "\n".join([WITHOUT_TRAIN, *loads, "assert Missing.asked == [], Missing.asked"]))


@pytest.mark.process
def test_torch_is_really_missing() -> None:
    """The test above would fail: a torch module does not load there."""
    refused = "try: import cm_runtime.networks.unet\nexcept ModuleNotFoundError: pass"
    python("-c", "\n".join([WITHOUT_TRAIN, refused, "assert Missing.asked == ['torch'], Missing.asked"]))


@pytest.mark.process
def test_sampling_asks_for_no_torch(tmp_path: Path) -> None:
    """From Python and from the command line, with the bundled model; nor is torch tried and done without.

    Whether OpenVINO is there is asked, as another engine, and doctor asks for torch.
    """
    draw = """
import cm_runtime as cm
from cm_runtime.cli import app
model = cm.load()
images = cm.sample(model, count=3, steps=2)
channels, height, width = model.manifest.image_shape
assert images.shape == (3, height, width, channels) and images.dtype == "uint8"
for command in ["sample --batch 3 --steps 1", "sample --batch 3 -o s.npz", "info", "doctor"]:
    assert set(Missing.asked) <= {"openvino"}, Missing.asked
    app(command.split(), standalone_mode=False)
"""
    python("-c", WITHOUT_TRAIN + draw, cwd=tmp_path)
    assert (tmp_path / "samples.png").stat().st_size > 0


@pytest.mark.quick("words1")
@pytest.mark.process
@pytest.mark.parametrize("words", [["--help"], ["sample", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    """Help appears at once. (pydantic may be there: typer reads a command's options with it.)"""
    log = python("-X", "importtime", "-m", "cm_runtime", *words).stderr
    loaded = {
        line.rpartition("|")[2].strip().split(".")[0] for line in log.splitlines() if line.startswith("import time:")
    }
    assert "typer" in loaded
    assert loaded & {"numpy", "onnx", "onnxruntime", "PIL", "torch"} == set()


# Public names


def test_public_names() -> None:
    """What ``import cm_runtime as cm`` offers: the list above, at run time and to type checkers."""
    assert cm.__all__ == PUBLIC
    assert [name for name in dir(cm) if not name.startswith("__")] == PUBLIC
    assert all(getattr(cm, name).__name__.split(".")[-1] == name for name in PUBLIC)
    typed = imports(ast.parse((PACKAGE / "__init__.py").read_text()), ["cm_runtime"])
    assert sorted(found.name.split(".")[-1] for found in typed if found.when == "types") == PUBLIC
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cm.nothing


# One formula, one loop

COEFFICIENTS = {"c_skip", "c_out", "c_in", "c_noise"}
OTHER_FORMULAS = ["training.losses"]  # EDM's weight of a loss: 1 / c_out^2
OTHER_LOOPS = {
    "heun",  # an ODE solver, for teachers
    "_images",  # a trial of engines, which compares what they make of every step
    "_multistep",  # the loop around other programs' engines
}


def formulas(tree: ast.AST) -> Iterator[int]:
    """Lines that assign arithmetic to a coefficient, or add the squares of sigma_data and of something else."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            is_arithmetic = any(isinstance(each, ast.BinOp) for each in ast.walk(node.value))
            calls = {getattr(each.func, "attr", "") for each in ast.walk(node.value) if isinstance(each, ast.Call)}
            if names & COEFFICIENTS and (is_arithmetic or calls & {"divide", "multiply", "sqrt"}):
                yield node.lineno
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            squares = [ast.unparse(side) for side in (node.left, node.right)]
            if all("** 2" in each for each in squares) and any("data" in each for each in squares):
                yield node.lineno


def model_loops(tree: ast.AST) -> Iterator[str]:
    """Functions that call denoise inside for or while."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            loops = (node for node in ast.walk(function) if isinstance(node, ast.For | ast.While))
            calls = (node.func for loop in loops for node in ast.walk(loop) if isinstance(node, ast.Call))
            if any("denoise" in (getattr(call, "attr", ""), getattr(call, "id", "")) for call in calls):
                yield function.name


def test_nothing_but_precond_computes_a_coefficient() -> None:
    files = {name: ast.parse(file.read_text()) for name, file in modules(PACKAGE).items()}
    assert [name for name, tree in files.items() if name != "precond" and [*formulas(tree)]] == OTHER_FORMULAS
    assert len([*formulas(files["precond"])]) == 2  # the sums of squares under c_in and c_out
    for source in (
        "c_out = sigma_data * d / root",
        "c_skip = ops.divide(variance, total)",
        "x = f(s**2 + sigma_data**2)",
        "if c_in := 1 / root: pass",
    ):
        assert [*formulas(ast.parse(source))] == [1], source
    assert not [*formulas(ast.parse("c_skip, c_out = form.c_skip(s), form.c_out(s)"))]


def test_nothing_but_run_loops_over_steps() -> None:
    trees = [ast.parse(file.read_text()) for file in modules(PACKAGE).values()]
    assert sorted(name for tree in trees for name in model_loops(tree)) == sorted(["run", *OTHER_LOOPS])
    planted = "def f():\n while 1:\n  x = model.denoise(x, sigma, label)"
    assert [*model_loops(ast.parse(planted))] == ["f"]


# Words of the product

# Options of other programs that are run or named: pip, nvidia-smi, git.
FOREIGN = {"--format", "--query", "--force-reinstall"}
FOREIGN |= {"--porcelain", "--verify", "--quiet", "--end-of-options", "--show-toplevel"}
WORDS = {"height", "shape", "split", "columns", "self.threads"}  # sizes and names before a plural; a key's own count
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]\b")
NOUNS = "answer|block|candidate|class|classe|constant|feature|frame|image|label|scenario|shard|step|thread"
COUNT = re.compile(rf" ({NOUNS})s\b")


def literals(file: Path) -> Iterator[tuple[int, str]]:
    """Every string of a file, pieces of f-strings and docstrings among them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def options() -> set[str]:
    """Every option of every command."""
    import typer.main

    from cm_runtime.cli import app

    names, left = {"--help"}, [typer.main.get_command(app)]
    while left:
        command = left.pop()
        for parameter in command.params:
            names |= {*parameter.opts, *parameter.secondary_opts}
        left += getattr(command, "commands", {}).values()
    return names


@pytest.mark.process
def test_every_option_that_is_named_exists() -> None:
    """A refusal that names an option which no command has sends its reader astray."""
    known = options() | FOREIGN
    unknown = [
        f"{file.relative_to(PACKAGE)}:{line}: {option}"
        for file in modules(PACKAGE).values()
        for line, text in literals(file)
        for option in OPTION.findall(text)
        if option not in known
    ]
    assert unknown == []


def counts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """F-strings in which a plain number stands before a plural: one of it would read "1 steps"."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        for number, after in itertools.pairwise(node.values):
            if not isinstance(number, ast.FormattedValue) or number.format_spec or not isinstance(after, ast.Constant):
                continue
            is_constant = isinstance(number.value, ast.Name) and number.value.id.isupper()
            if not is_constant and ast.unparse(number.value) not in WORDS and (found := COUNT.match(str(after.value))):
                yield node.lineno, f"{ast.unparse(number.value)}{found[0]}"


@pytest.mark.process
def test_counts_agree_with_their_nouns() -> None:
    """`errors.wording.quantity` writes both."""
    told = [
        f"{file.relative_to(PACKAGE)}:{line}: {text}"
        for file in modules(PACKAGE).values()
        for line, text in counts(ast.parse(file.read_text()))
    ]
    assert told == []
    source = 'f"{n} steps, {MOST} images, {rate:.1f} images/s, {len(x)} labels"'
    assert [text for _, text in counts(ast.parse(source))] == ["n steps", "len(x) labels"]


# Bare participles and adverbs name nothing: `Job.from_request` for made, `load_job` for kept.
NO_NAMES = {
    *(
        "ahead",
        "apart",
        "asked",
        "chosen",
        "collected",
        "counted",
        "done",
        "drawn",
        "expected",
        "found",
        "given",
        "held",
    ),
    *("kept", "known", "left", "made", "missed", "named", "observed", "opened", "own", "recovered", "said", "seen"),
    *("served", "shown", "stored", "taken", "told", "wanted", "written"),
}
NO_VARIABLES = {"asked", "chosen", "found", "given", "made", "said", "told", "wanted"}


def product_files() -> Iterator[Path]:
    yield from modules(PACKAGE).values()
    yield from (ROOT / "benchmarks").glob("*.py")


def test_nothing_is_named_by_a_bare_participle() -> None:
    """Modules, functions, classes and parameters by none; variables by the commonest hardly ever."""
    names, variables = [], []
    for file in product_files():
        names += [file.stem] * (file.stem in NO_NAMES)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names += [f"{file}: {node.name}"] * (node.name.strip("_").lower() in NO_NAMES)
            elif isinstance(node, ast.arg):
                variables += [f"{file}: {node.arg}"] * (node.arg in NO_VARIABLES)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                variables += [f"{file}: {node.id}"] * (node.id in NO_VARIABLES)
    assert names == []
    assert len(variables) < 10, variables


def test_docstrings_open_with_a_verb_or_a_noun() -> None:
    """Of a question word the reader learns nothing."""
    opening = re.compile(r'"""(What|Of|Whether|Which|Where|How) ')
    lines = [line for file in product_files() for line in file.read_text().splitlines() if opening.search(line)]
    assert len(lines) < 20, lines


def definitions(tree: ast.AST) -> set[str]:
    """Names that a module makes itself: functions, classes, and whatever it assigns to."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def test_names_come_from_the_modules_that_define_them() -> None:
    """No module hands on what it has from another; the face alone does."""
    files = modules(PACKAGE)
    trees = {module: ast.parse(file.read_text()) for module, file in files.items()}
    homes = {module: definitions(tree) | {"__version__"} for module, tree in trees.items()}
    borrowed = [
        f"{module}: {alias.name} from {node.module}"
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if module not in FACE and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cm_runtime")
        for alias in node.names
        if (home := (node.module or "").removeprefix("cm_runtime").removeprefix(".")) in homes
        and f"{home}.{alias.name}".lstrip(".") not in files
        and alias.name not in homes[home]
    ]
    assert borrowed == []


def public() -> dict[str, Any]:
    """Functions and values that users import, by name."""
    from cm_runtime import editing, noise, request, schedule
    from cm_runtime.backends.base import EngineOptions

    functions = [
        cm.load,
        cm.load_checkpoint,
        cm.sample,
        cm.stream,
        *(getattr(cm.export, name) for name in cm.export.__all__),
    ]
    functions += [
        getattr(editing, name) for name in ("inpaint", "colorize", "superres", "stroke", "denoise", "interpolate")
    ]
    functions += [noise.words, noise.normal, noise.normals, noise.random_labels, request.sampling_request]
    values = [request.Draw, EngineOptions, schedule.NoiseRange]
    return {each.__qualname__: each for each in [*functions, *values]}


@pytest.mark.parametrize("name", public())
def test_public_docstrings_are_whole(name: str) -> None:
    """Arguments, results, errors and an example; ruff holds their form to Google's convention."""
    each = public()[name]
    text = each.__doc__
    sections = ["Args:", "Example:"] if isinstance(each, type) else ["Args:", "Raises:", "Example:"]
    if not isinstance(each, type) and inspect.signature(each, eval_str=False).return_annotation not in (None, "None"):
        sections.append("Returns:")
    assert [section for section in sections if f"\n    {section}" not in text and f"\n{section}" not in text] == []


def test_draw_options_are_fields_of_draw() -> None:
    """The keywords of public functions, whose types checkers see, are those of the value that they make."""
    from dataclasses import fields

    from cm_runtime.editing import EditOptions
    from cm_runtime.request import Draw, DrawOptions

    names = {field.name for field in fields(Draw)}
    assert {*DrawOptions.__annotations__} == names - {"count", "steps", "seed"}
    assert {*EditOptions.__annotations__} == names - {"count"} | {"answers"}


FACE_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import inspect, pydoc
import cm_runtime as cm
scope = {}
exec("from cm_runtime import *", scope)
print(sorted(name for name in scope if not name.startswith("__")) == cm.__all__)
print({name for name, _ in inspect.getmembers(cm)} >= {*cm.__all__}, all(hasattr(cm, name) for name in cm.__all__))
text = pydoc.plain(pydoc.render_doc(cm))
print(all(name in text for name in cm.__all__), "consistency model" in text)
text = pydoc.plain(pydoc.render_doc(cm.export))
assert cm.export.__all__ == ["diffusers", "onnx", "tensorrt"]
try:
    cm.export.tensorrt("m.onnx", "m.engine", batches=[(8, 4, 2)])
except cm.errors.RequestError as error:
    assert "ascending" in str(error)
print("precision" in text and "TensorRT" in text, "precond" in pydoc.plain(pydoc.render_doc(cm.load_checkpoint)))
for use in (cm.load_checkpoint, lambda path: cm.export.onnx(None, path), lambda path: cm.export.diffusers(None, path)):
    try:
        use("m.onnx")
    except cm.errors.MissingExtraError as error:
        print(error)
"""


@pytest.mark.process
def test_the_face_is_whole_without_torch() -> None:
    """help, star import and the tools that walk modules work; what needs torch says so when it is called."""
    lines = python("-c", FACE_WITHOUT_TORCH).stdout.splitlines()
    assert lines[:4] == ["True", "True True", "True True", "True True"]
    wanted = "needs torch: pip install 'cm-runtime[train]'"
    assert lines[4:] == [f"cm_runtime.{name} {wanted}" for name in ("load_checkpoint", "export", "export")]
