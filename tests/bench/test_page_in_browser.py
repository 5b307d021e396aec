"""The page in headless Chromium, on a phone and on a desk: all of it is seen, nothing is asked of the network."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
import example_results

from cm_runtime.bench.report import page as pages
from cm_runtime.bench.report import quality
from cm_runtime.bench.report.plots import draw_plots

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync", "--no-first-run"]
PLOTS = {"full": 9, "awkward": 5}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is installed")
    assert CHROMIUM is not None, f"CI must have one of {', '.join(NAMES)}"
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything, and one of a run that went wrong in every way."""
    place = tmp_path_factory.mktemp("pages")
    found = [quality.Quality.model_validate(example_results.evaluated(steps, 2.0 / steps)) for steps in (1, 2, 4)]
    for name, result, judged in (("full", example_results.full(), found), ("awkward", example_results.awkward(), [])):
        (place / f"{name}.html").write_text(pages.html(result, draw_plots(result, judged), judged))
    return place


@pytest.mark.covering(1)
@pytest.mark.process
@pytest.mark.parametrize(
    ("width", "height", "offline"), [(360, 740, True), (390, 844, False), (1440, 900, False), (1440, 900, True)]
)
@pytest.mark.parametrize("name", ["full", "awkward"])
def test_all_is_seen(browser: Any, folder: Path, name: str, width: int, height: int, offline: bool) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, offline=offline)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    where = (folder / f"{name}.html").as_uri()
    page.goto(where)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator("figure img")
    assert images.count() == PLOTS[name]
    for n in range(images.count()):
        image = images.nth(n)
        box = image.bounding_box()
        assert image.is_visible() and box is not None
        assert box["width"] > 250 and box["height"] > 80 and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
        ratio = image.evaluate("image => image.naturalWidth / image.naturalHeight")
        assert box["width"] / box["height"] == pytest.approx(ratio, rel=0.02)
    for table in page.locator("table").all():
        shown, held = table.evaluate("({parentElement: box}) => [box.clientWidth, box.scrollWidth]")
        assert table.is_visible() and 250 < shown <= min(width, held)  # what is wider scrolls inside its box
    assert [word for word in said if not word.startswith(("log", "info"))] == []
    assert [url for url in asked if not url.startswith("data:")] == [where]
    context.close()


@pytest.mark.slow
def test_a_plot_is_drawn_not_blank(browser: Any, folder: Path) -> None:
    """The pixels of each figure: ink of more than one colour on its white card, in the dark scheme too."""
    import io

    from PIL import Image

    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        page = context.new_page()
        page.goto((folder / "full.html").as_uri())
        for n in range(PLOTS["full"]):
            image = Image.open(io.BytesIO(page.locator("figure img").nth(n).screenshot())).convert("RGB")
            colours = image.getcolors(1 << 20) or []
            white = sum(count for count, colour in colours if colour == (255, 255, 255))
            assert 0.4 < white / (image.width * image.height) < 0.99
            coloured = sum(count for count, colour in colours if max(colour) - min(colour) > 80)
            assert coloured > 20
        context.close()
