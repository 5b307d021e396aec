"""What a report shows is what the result holds: pages, Markdown, PNGs, and the README's table."""

from __future__ import annotations

import html.parser
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
import example_results
import table as readme_table  # type: ignore[import-not-found]

from cm_runtime.bench import results
from cm_runtime.bench.report import environment, formatting, markdown, quality, tables
from cm_runtime.bench.report import page as pages
from cm_runtime.bench.report.plots import draw_plots
from cm_runtime.cli.bench.report import report
from cm_runtime.errors import ArtifactError, MissingExtraError, OutputError, RequestError

FULL = (
    *("latency-by-batch", "latency-by-steps", "throughput-by-batch", "throughput-by-steps"),
    *("speed-ups", "outside-network", "gflops", "server"),
)

pytestmark = pytest.mark.process  # matplotlib asks fc-list for fonts where it has no list of them yet


class Page(html.parser.HTMLParser):
    """A page as its tables' rows, its pictures, its text outside styles, and every tag and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._table: list[list[str]] | None = None
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs)["id"] or "", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        elif tag == "img":
            self.images.append(dict(attrs))
        if tag in ("img", "meta", "link", "br"):
            self._inside.pop()

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if "style" in self._inside:
            return
        self.text += data
        if self._table and self._table[-1] and "sup" not in self._inside and {"td", "th"} & set(self._inside):
            self._table[-1][-1] += (" " if "span" in self._inside else "") + data.strip("\n")

    def column(self, table: str, name: str) -> list[str]:
        """The fields of a column, of rows that have them all."""
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows if len(row) == len(head)]


def page(result: results.Result, found: tuple[quality.Quality, ...] = ()) -> str:
    return pages.html(result, draw_plots(result, found), found)


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(page(example_results.full()))


@pytest.fixture(scope="module")
def awkward() -> Page:
    return Page(page(example_results.awkward()))


# The numbers


@pytest.mark.process
def test_the_headline_table_holds_the_results_numbers(full: Page) -> None:
    """Value and interval of every scenario, to the digits that are shown."""
    result = example_results.full()
    for shown, scenario in zip(full.column("headline", "p50, ms"), result.scenarios, strict=True):
        latency = scenario.contenders[0].latency
        assert latency is not None
        value, low, high = (float(number) for number in re.findall(r"[\d.]+", shown))
        assert (value, low, high) == pytest.approx((latency.p50.value, latency.p50.low, latency.p50.high), rel=1e-3)
    rates = [float(shown.split()[0]) for shown in full.column("headline", "images/s")[:-1]]
    assert rates == pytest.approx([s.contenders[0].images_per_s.value for s in result.scenarios[:-1]], rel=1e-3)  # type: ignore[union-attr]
    assert full.column("headline", "p99, ms") == [formatting.DASH] * 8
    assert tables.UNBOUNDED in full.text and tables.ALONE in full.text and tables.NO_OPERATIONS not in full.text
    (row,) = [row for row in full.tables["headline"] if row[0].startswith("1 step, batch 64")]
    assert row[6:] == ["1.82 (1.79 to 1.90)", "0.0815", "212 MB", "3.1%", "84.2", "41.2%", row[12]]
    assert row[12] == "1.3e-6 0 of 255, from diffusers"


def test_peers_stand_beside_with_their_ratios_and_reasons(full: Page) -> None:
    """The ratio with its interval; absent and failed ones say why."""
    rows = full.tables["peers"]
    torch = [row for row in rows if "torch 0.35.1" in row]
    assert len(torch) == 6 and "1.300 [1.261, 1.339]" in torch[0] and "0.9300 [0.9021, 0.9579]" in torch[2]
    assert sum("absent: there is no C++ compiler" in row for row in rows) == 6
    assert sum("failed: images differ by 0.3, over 0.001" in row for row in rows) == 6
    assert "0.93 to 1.30" in full.text  # torch's range, at the top, where it is the faster too


def test_the_server_table_says_whether_the_bound_was_kept(full: Page) -> None:
    head, row = full.tables["served"]
    assert dict(zip(head, row, strict=True))["kept"] == "no"
    assert row[1:3] == ["19.7", "21.50 [21.29, 21.71]"] and row[5:7] == [formatting.DASH, "30.0"]
    kept = example_results.result(example_results.server().model_copy(update={"contenders": (_kept(),)}))
    assert tables.server(kept).rows[0].cells[7].text == "yes"


def test_what_was_not_compared_says_why() -> None:
    """A side that was measured may still have a reason: why there is no parity beside its numbers."""
    side = example_results.subject(3.0, 1, agreement=None, reason="not compared with torch: it is not installed")
    shown = Page(page(example_results.result(example_results.scenario(2, 1, side))))
    assert shown.column("headline", "parity") == [formatting.DASH]
    assert "not compared with torch: it is not installed" in shown.text


def _kept() -> results.Contender:
    served = results.ServerResult(rate=20, bound_ms=300, met=True, mean_batch=2)
    return example_results.side(latency=example_results.latency(21.5), served=served)


def test_the_environment_is_told(full: Page) -> None:
    for told in ("AMD EPYC 9B14", "avx2 avx512f", "glibc 2.36", "2800 to 3700 MHz", "204.4 [202.4, 206.4] GFLOP/s"):
        assert told in full.text
    for told in ("1.1%", "0.10%", "0123456789abcdef", "onnxruntime 1.32.0", "result.samples, 123 kB", "2.5e-6"):
        assert told in full.text
    assert environment.troubles(example_results.full()) == []


@pytest.mark.process
def test_troubles_come_first(awkward: Page) -> None:
    """Incomplete, failed, disturbed, quick: nothing of it must be searched for."""
    start = awkward.text[:1200]
    for told in ("This run is incomplete: it was stopped after 5 scenarios", "2 scenarios of 5 failed"):
        assert told in start
    for told in ("throttled 3 times", "SwPowerCap", "12.0% of the processor time to others", "used 20.0%"):
        assert told in start
    assert "the warm-up ended before" in start
    assert awkward.text.index("fashion-mnist offline, 2 steps, batch 256") > awkward.text.index("Left out")
    (failed,) = [row for row in awkward.tables["headline"] if row[-1].startswith("failed: out of memory")]
    assert len(failed) == 2
    assert [row[1] for row in awkward.tables["headline"] if row[0].startswith("1 step")] == [
        "41.50",
        "1.250 [1.238, 1.262]",
    ]
    assert "p50 on the device, ms" in awkward.tables["headline"][0] and "GPU 1.23 GB" in awkward.text
    assert any("base 0.35.1 fedcba9876" in row for row in awkward.tables["peers"])


def test_an_empty_run_has_a_page() -> None:
    """Stopped before its first scenario."""
    empty = Page(page(example_results.result(complete=False, conditions=None, peaks=(), samples=None)))
    assert "stopped after 0 scenarios" in empty.text and "No scenario was finished." in empty.text
    assert empty.images == [] and empty.tables == {}
    assert "stopped after 0 scenarios" in markdown.summary(example_results.result(complete=False))


# The plots


def test_plots_that_have_something_to_show() -> None:
    assert [plot.name for plot in draw_plots(example_results.full())] == list(FULL)
    lone = example_results.result(
        example_results.scenario(2, 1, example_results.side(latency=example_results.latency(3.0)))
    )
    assert draw_plots(lone) == []  # one point is no line
    suffixed = {plot.name for plot in draw_plots(example_results.awkward())}
    assert suffixed and all(re.fullmatch(r"[a-z-]+-fashion-mnist-torch-cuda-0", name) for name in suffixed)


@pytest.mark.process
def test_quality_by_steps() -> None:
    """Reports of one extractor and reference share a plot; real images are a level; one report alone is no plot."""
    found = [quality.Quality.model_validate(example_results.evaluated(steps, 2.0 / steps)) for steps in (1, 2, 4)]
    real = {"kind": "data", "path": "fashion-mnist", "sigmas": [], "sampler": "", "sha256": ""}
    found.append(quality.Quality.model_validate(example_results.evaluated(1, 0.06, **real)))
    names = [plot.name for plot in draw_plots(example_results.full(), found)]
    assert names == [*FULL, "quality-by-steps"]
    (plot,) = [plot for plot in draw_plots(example_results.full(), found) if plot.name == "quality-by-steps"]
    assert "fashion-mnist: 1: 2.000, 2: 1.000, 4: 0.5000" in plot.alt and "fashion-mnist" in plot.alt
    assert [plot.name for plot in draw_plots(example_results.full(), found[:1])] == list(FULL)
    shown = Page(page(example_results.full(), tuple(found)))
    assert shown.column("qualities", "Frechet distance") == ["2.00", "1.00", "0.500", "0.0600"]
    other = [each.model_copy(update={"extractor": quality.Source(sha256="99" * 32)}) for each in found]
    assert [plot.name for plot in draw_plots(example_results.full(), found + other)][-1] == "quality-by-steps-2"


def test_figures_have_their_numbers_in_words(full: Page) -> None:
    assert [image["alt"] is not None and len(image["alt"]) > 30 for image in full.images] == [True] * len(FULL)
    assert "1 step: 1: 3.210 [3.178, 3.242]" in (full.images[0]["alt"] or "")


@pytest.mark.process
def test_a_value_that_no_axis_can_hold_is_left_out() -> None:
    """Numbers of a file are anybody's: zero, negative, huge."""
    huge, odd = (
        (1 << 63) - 1,
        example_results.scenario(
            (1 << 63) - 1, 1 << 62, example_results.subject(1.0, 1), example_results.peer("torch", 1.0, 0.0)
        ),
    )
    nothing = example_results.scenario(
        1, 1, example_results.subject(1.0, 1, gflop_per_s=0.0, outside_network=7.0, peak_host_bytes=huge)
    )
    negative = example_results.scenario(
        2, 1, example_results.side(latency=example_results.latency(0.0), images_per_s=example_results.estimate(1e99))
    )
    broken = example_results.result(odd, nothing, negative, example_results.server())
    assert {plot.name for plot in draw_plots(broken)} <= {"outside-network", "gflops", "server"}
    assert "9223372 TB" in page(broken) and "1.000e99" in markdown.summary(broken)


def test_plots_are_of_the_first_setups_and_tables_of_all() -> None:
    """A plot takes a tenth of a second, and a result may hold a thousand models."""
    many = [example_results.scenario(1, 1, example_results.subject(1.0, 1), model=f"m{n}") for n in range(14)]
    many.append(example_results.scenario(1, 8, example_results.subject(2.0, 8), model="m0"))
    plots = draw_plots(example_results.result(*many))
    assert {plot.name.rpartition("-")[2] for plot in plots} == {f"m{n}" for n in range(12)}
    assert "first 12 setups" in plots[0].caption and "other 2 too" in plots[0].caption
    assert "m13" in markdown.summary(example_results.result(*many))


# Hostile text


@pytest.mark.process
def test_names_stay_text(awkward: Page) -> None:
    """Mark-up from a file is shown, never obeyed: in the page, its attributes and its plots."""
    assert "script" not in awkward.tags and "<script>alert(1)</script>" in awkward.text
    assert not any(name.startswith("on") for name, _ in awkward.attributes)
    assert "\u202e" not in page(example_results.awkward())
    allowed = {"data:image/svg+xml", None}
    assert {(image["src"] or "").split(";")[0] or None for image in awkward.images} <= allowed
    assert all((value or "").startswith("#") for name, value in awkward.attributes if name == "href")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in awkward.attributes


def test_markdown_is_escaped() -> None:
    """A hostile name breaks no table, adds no line, no mark-up, no mathematics and no mention."""
    text = markdown.summary(example_results.awkward())
    assert "<script" not in text and "$" not in text
    lines = text.splitlines()
    for n, line in enumerate(lines):
        if line.startswith("| ---"):
            width = len(re.split(r"(?<!\\)\|", line))
            rows = [row for row in lines[n - 1 :] if row.startswith("|")][: lines[n:].index("") + 1]
            assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {width}
    assert markdown.escape("a|b\n# c *d* <e> @f [g](https://h) `i`") == (
        "a\\|b \\# c \\*d\\* &lt;e&gt; &#64;f \\[g\\](https&#58;//h) \\`i\\`"
    )


def test_markdown_says_the_same(full: Page) -> None:
    text = markdown.summary(example_results.full())
    assert "3.210 \\[3.178, 3.242\\]" in text and "absent: there is no C++ compiler" in text
    assert "1.3e-6 (0 of 255, from diffusers)" in text and "| torch (0.35.1) | 1.300 \\[1.261, 1.339\\] |" in text
    assert "### Server" in text and "### Quality" not in text
    assert text.count("\n| fashion-mnist: ") == 8 + 6 * 5 + 1


def test_markdown_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither matplotlib nor jinja2; a page names the extra that brings them."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert markdown.summary(example_results.full())
    with pytest.raises(MissingExtraError, match=r"needs matplotlib: pip install 'cm-runtime\[report\]'"):
        draw_plots(example_results.full())
    with pytest.raises(MissingExtraError, match=r"needs jinja2: pip install 'cm-runtime\[report\]'"):
        pages.html(example_results.full(), [])


@pytest.mark.process
def test_the_same_result_gives_the_same_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the day, nor the user's matplotlib settings."""
    import matplotlib

    first = page(example_results.awkward())
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert page(example_results.awkward()) == first


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0"), (3, "3"), (0.0, "0"), (12.34, "12.3"), (0.001234, "0.00123"), (1.23e-6, "1.23e-6")),
        *((123456.0, "123456"), (1e9, "1.00e9"), (10**400, "∞"), (-2.5, "-2.50"), (None, formatting.DASH)),
    ],
)
def test_digits(value: float | None, shown: str) -> None:
    assert formatting.digits(value) == shown


def test_a_commit_with_changes_says_so() -> None:
    assert (formatting.short("0123456789abcdef+"), formatting.short("0123456789abcdef")) == (
        "0123456789+",
        "0123456789",
    )


# The command


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`cm-runtime bench report` in a folder with a result and two eval reports."""
    monkeypatch.chdir(tmp_path)
    results.write(example_results.full(), "result.json")
    for steps in (1, 2):
        Path(f"eval{steps}.json").write_text(json.dumps(example_results.evaluated(steps, 2.0 / steps)))
    app = typer.Typer()
    app.command()(report)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def names() -> list[str]:
    return sorted(path.name for path in Path().rglob("*") if path.is_file() and not path.name.startswith("eval"))


@pytest.mark.process
def test_by_default_the_page_lies_beside_the_result(bench: Callable[..., Any]) -> None:
    done = bench("result.json", "--quality", "eval1.json", "--quality", "eval2.json")
    assert (done.exit_code, done.exception) == (0, None)
    assert done.output == "result.html: 8 scenarios, 9 plots\n"
    assert names() == ["result.html", "result.json"]
    assert Page(Path("result.html").read_text()).column("qualities", "steps") == ["1", "2"]


@pytest.mark.process
def test_plots_are_pictures(bench: Callable[..., Any]) -> None:
    """1040 pixels wide, named as in the page; the folder is example_results."""
    assert bench("result.json", "--plots", "pictures", "-o", "page.html").exit_code == 0
    assert sorted(path.stem for path in Path("pictures").iterdir()) == sorted(FULL)
    sizes = {path.stem: Image.open(path).size for path in Path("pictures").iterdir()}
    assert sizes["latency-by-batch"] == (1040, 720)
    assert {width for width, _ in sizes.values()} == {1040}
    assert Path("page.html").exists() and not Path("result.html").exists()


@pytest.mark.process
def test_markdown_is_printed(bench: Callable[..., Any]) -> None:
    """In place of the page, or beside it with -o."""
    done = bench("result.json", "--markdown")
    assert (done.exit_code, done.output) == (0, markdown.summary(example_results.full()))
    assert names() == ["result.json"]
    assert bench("result.json", "--markdown", "-o", "page.html").output == done.output
    assert names() == ["page.html", "result.json"]


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["result.json", "-o", "page.pdf"], RequestError, "must end in .html"),
        (["gone.json"], ArtifactError, "no such file"),
        (["eval1.json"], ArtifactError, "is no result of cm-runtime bench run"),
        (["result.json", "--quality", "result.json"], ArtifactError, "is no report of cm-runtime eval -o"),
        (["result.json", "--quality", "gone.json"], ArtifactError, "no such file"),
        (["result.json", "-o", "no/page.html"], OutputError, "there is no folder no"),
        (["result.json", "--plots", "result.json"], OutputError, "cannot be made"),
        (["copy.html"], RequestError, "is the result itself"),
    ],
)
def test_what_is_refused(bench: Callable[..., Any], words: list[str], error: type[Exception], told: str) -> None:
    """With nothing written."""
    Path("copy.html").write_bytes(Path("result.json").read_bytes())
    before = names()
    done = bench(*words)
    assert isinstance(done.exception, error) and told in str(done.exception)
    assert names() == before


# The README's table


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Speed\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nMore.\n")
    results.write(example_results.full(), tmp_path / "a.json")
    results.write(example_results.awkward(), tmp_path / "b.json")
    return path


def test_the_readme_holds_the_table(readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between its markers; --check tells an old one from what the results say."""
    words = [str(readme.with_name("a.json")), "--readme", str(readme)]
    assert readme_table.main([*words, "--check"]) == 1
    assert "is not what these results say" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert readme_table.main(words) == 0 == readme_table.main([*words, "--check"])
    text = readme.read_text()
    assert text.startswith("# Speed\n\n<!-- benchmarks:begin -->\n\n| model | steps |") and text.endswith("\nMore.\n")
    assert "old" not in text and "<!-- benchmarks:end -->" in text
    row = "| fashion-mnist | 1 | 1 | 3.210 \\[3.178, 3.242\\] | 311.5 |"
    row += " 1.30x \\[1.261, 1.339\\] | 2.17x \\[2.105, 2.235\\] |"
    assert row + " 84.2 (41.2%) |" in text
    assert "AMD EPYC 9B14, 2 cores, 8.20 GB, virtual; cm-runtime 0.1.0 (0123456789), onnxruntime 1.32.0" in text
    assert "| fashion-mnist | 2 | up to 64, 19.7/s | 21.50" in text
    assert "| fashion-mnist | 2 | 256, offline |" in text


def test_another_machine_has_its_own_table(readme: Path) -> None:
    both = [str(readme.with_name(name)) for name in ("a.json", "b.json")]
    assert readme_table.main([*both, "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.count("| model |") == 2 and "<script" not in text and "The run is incomplete." in text
    assert text.count("onnx takes") == 0  # never measured


@pytest.mark.parametrize(
    "text", ["", "<!-- benchmarks:begin -->\n", "<!-- benchmarks:end -->\n<!-- benchmarks:begin -->\n"]
)
def test_a_readme_without_markers_is_left_alone(readme: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    readme.write_text(text)
    assert readme_table.main([str(readme.with_name("a.json")), "--readme", str(readme)]) == 1
    assert "needs one line <!-- benchmarks:begin -->" in capsys.readouterr().err
    assert readme.read_text() == text
