"""The page in a real browser, and the pictures beside it."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib import colormaps
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, sync_playwright

from adadim_lightning.report.figures import plots
from adadim_lightning.report.page import command_line, write_page
from adadim_lightning.report.pictures import draw_plane, write_pictures
from adadim_lightning.report.runs import read_runs
from adadim_lightning.report.study import Study
from tests.report.runs import write_run, write_sweep

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the path")

HOSTILE = "<script>alert(1)</script><!-- </script> \"'&amp; ${x} $\\frac$ `%{x}` <b>bold</b> \u2028 Größe 数"
PLANE_DRAWN = "performance.getEntriesByName('drawn H(R) and I(R;Z)').length > 0"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Open = Callable[..., Page]


def wait(page: Page, condition: str) -> None:
    """Until it holds; Playwright's own way needs eval, which the page's security policy forbids."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never came true: {condition}")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a report; whatever goes wrong in it, or asks for the network, fails the test."""
    wrong: list[str] = []
    contexts = []

    def open_(path: Path, *, width: int = 1280, **settings: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request", lambda request: request.url == path.as_uri() or wrong.append(f"asks {request.url[:80]}")
        )
        page.goto(path.as_uri())
        wait(page, PLANE_DRAWN)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def report(root: Path, metric: str | None = None) -> Path:
    """Read the runs below a folder and write the page."""
    runs, warnings = read_runs([root])
    study = Study(runs, metric, warnings=warnings)
    path = root / "report.html"
    write_page(study, study.arms[0] if study.arms else None, path, [path.with_name("a picture.png")])
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three arms with three seeds each, the first the best, and of one run that failed."""
    root = write_sweep(tmp_path_factory.mktemp("sweep"), ["a=1", "a=2", "a=3"], range(3))
    write_run(root / "9", "a=3", seed=3, status="failed", error="the disk is full", columns={})
    return report(root)


def cells(page: Page, table: str, column: int) -> list[str]:
    return [text.strip() for text in page.locator(f"{table} tbody tr > :nth-child({column})").all_inner_texts()]


def lines(page: Page, plot: str) -> list[dict[str, Any]]:
    """Arm and visibility of each trace of a plot, as Plotly has them."""
    element = f"document.querySelector('[data-plot=\"{plot}\"]')"
    return page.evaluate(f"{element}.data.map(t => ({{arm: t.meta.arm, visible: t.visible, name: t.name}}))")


@needs_browser
def test_the_page_shows_all_runs_and_the_best(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    assert "10 runs in 3 arms: 9 ok, 1 failed" in page.inner_text("header")
    assert "Best: a=1, seed 0, with 0.9000. Of 9 finished runs it takes place 1 by high H(R)" in page.inner_text(
        "#plane"
    )
    assert cells(page, "#table", 3)[0] == "0.8990 ± 0.0010"
    assert cells(page, "#table", 2) == ["3", "3", "3 of 4"]
    assert cells(page, "#runs", 4) == ["ok"] * 9 + ["failed"]
    assert cells(page, "#runs", 8)[9] == "the disk is full"
    assert page.inner_text("#command") == "adadim-train a=1 seed=0"
    assert len(page.locator("svg.main-svg").all()) >= 1


@needs_browser
def test_what_is_out_of_sight_is_drawn_when_it_comes_near(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    spectrum = page.locator('[data-plot="spectrum/Z"]')
    assert spectrum.locator("svg").count() == 0
    spectrum.scroll_into_view_if_needed()
    spectrum.locator("svg").first.wait_for()


@needs_browser
def test_tables_are_sorted_by_the_keyboard_alone(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    header = page.locator("#table th", has_text="accuracy")
    assert header.get_attribute("aria-sort") == "descending"
    page.locator("#baseline").focus()
    for _ in range(4):  # the table's own box, arm, runs, accuracy
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "accuracy"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    ascending = [float(text.split()[0]) for text in cells(page, "#table", 3)]
    assert ascending == sorted(ascending)
    page.keyboard.press("Space")
    assert [float(text.split()[0]) for text in cells(page, "#table", 3)] == ascending[::-1]
    page.locator("#runs th", has_text="accuracy").locator("button").press("Enter")
    page.locator("#runs th", has_text="accuracy").locator("button").press("Enter")
    assert cells(page, "#runs", 5)[-1] == "\N{EN DASH}"  # the one without a value is last either way
    assert page.locator("th[aria-sort='descending']").count() == 1
    page.locator("#runs th", has_text="folder").locator("button").press("Enter")
    assert cells(page, "#runs", 1) == [str(i) for i in range(10)]


@needs_browser
def test_another_baseline_changes_the_differences(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    assert cells(page, "#table", 4)[0] == "baseline"
    second = cells(page, "#table", 4)[1]
    assert second.startswith("\N{MINUS SIGN}0.0200 [")
    assert second.endswith("n = 3")
    page.select_option("#baseline", label="a=2")
    assert cells(page, "#table", 4)[1] == "baseline"
    assert cells(page, "#table", 4)[0].startswith("+0.0200 [")
    page.locator("#table th", has_text="difference").locator("button").click()
    assert cells(page, "#table", 1) == ["a=1", "a=2", "a=3"]


@needs_browser
def test_arms_are_switched_off_in_all_plots_drawn_or_not(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    page.get_by_role("checkbox", name="a=2").focus()
    page.keyboard.press("Space")
    page.locator('[data-plot="dynamics/ER_R"]').scroll_into_view_if_needed()
    page.locator('[data-plot="dynamics/ER_R"] svg').first.wait_for()
    for plot in ("plane", "dynamics/ER_R"):
        assert {line["arm"]: line["visible"] for line in lines(page, plot)} == {0: True, 1: False, 2: True}
    page.get_by_role("button", name="none").click()
    assert not any(line["visible"] for line in lines(page, "plane"))
    page.get_by_role("button", name="all", exact=True).click()
    assert all(line["visible"] for line in lines(page, "plane"))


@needs_browser
def test_the_filter_narrows_the_runs(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    page.fill("#filter", "a=3 FAILED")
    assert page.locator("#runs tbody tr:visible").count() == 1
    assert page.inner_text("#shown") == "1 of 10"
    page.fill("#filter", "")
    assert page.locator("#runs tbody tr:visible").count() == 10


@needs_browser
def test_dark_and_light_follow_the_reader_and_the_plots_with_them(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep, color_scheme="dark")
    shade = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)[0]"
    ink = "document.querySelector('[data-plot=plane]').layout.font.color"
    assert page.evaluate(shade) < 60
    assert page.evaluate(ink) == "#e8eaee"
    page.emulate_media(color_scheme="light")
    wait(page, f"{ink} === '#1a1c20'")
    assert page.evaluate(shade) > 200


@needs_browser
def test_a_phone_shows_it_without_scrolling_sideways(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep, width=390, has_touch=True, is_mobile=True)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.locator("#table .box")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")  # the table scrolls in its own box
    assert page.evaluate("document.querySelector('[data-plot=plane]').layout.dragmode") is False


@needs_browser
@pytest.mark.parametrize("width", [360, 414, 800])
def test_long_names_do_not_widen_the_page(tmp_path: Path, width: int, open_page: Open) -> None:
    metric = "metric/" + "long_name_" * 12
    words = ["value_without_any_break_at_all_" * 8, "非常长的名字" * 40, "many words " * 40]
    for i, word in enumerate(words):
        folder, values = tmp_path / f"{i}-{'folder' * 20}", {metric: float(i)}
        write_run(folder, f"some.key={word}", error="E" * 300, level=0.1 * i, values=values)
    page = open_page(report(tmp_path, metric), width=width, has_touch=True, is_mobile=width < 500)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    title = page.locator('[data-plot="plane"] .cbtitle').bounding_box()
    assert title is not None
    assert title["x"] >= 0
    assert title["x"] + title["width"] <= width
    choice = page.locator("label:has(#baseline)").bounding_box()
    assert choice is not None
    assert choice["height"] < 90  # its words are beside or above it, not a letter a line
    page.locator('[data-plot="plane"] .points path').first.hover(force=True)
    hover = page.locator('[data-plot="plane"] .hoverlayer .hovertext')
    hover.first.wait_for()
    box = hover.first.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


@needs_browser
def test_plots_use_the_font_of_the_page(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.locator('[data-plot="plane"] .points path').first.hover(force=True)
    page.locator('[data-plot="plane"] .hoverlayer text').first.wait_for()
    families = "[...document.querySelectorAll('.main-svg text')].map(text => getComputedStyle(text).fontFamily)"
    assert set(page.evaluate(families)) == {page.evaluate("getComputedStyle(document.body).fontFamily")}


@needs_browser
def test_single_runs_of_arms_have_the_colors_of_their_accuracies(tmp_path: Path, open_page: Open) -> None:
    write_sweep(tmp_path, [f"a={i}" for i in range(5)], [0])
    page = open_page(report(tmp_path))
    plane = "document.querySelector('[data-plot=plane]')"
    ends = page.evaluate(f"[...{plane}.querySelectorAll('.points path')].map(path => path.style.fill)")[:5]
    accuracies = [0.9 - 0.02 * i for i in range(5)]
    scale = colormaps["viridis"]
    for end, accuracy in zip(ends, accuracies, strict=True):
        wanted = [255 * part for part in scale((accuracy - 0.82) / 0.08)[:3]]
        assert [int(x) for x in end[4:-1].split(",")] == pytest.approx(wanted, abs=12)
    lines = page.evaluate(f"{plane}.data.filter(t => t.mode === 'lines').map(t => t.line.color)")
    assert len(set(lines)) == 5


@needs_browser
def test_the_command_is_copied(sweep: Path, open_page: Open) -> None:
    page = open_page(sweep, permissions=["clipboard-read", "clipboard-write"])
    page.click("#copy")
    wait(page, "document.getElementById('copied').textContent === 'copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "adadim-train a=1 seed=0"


@needs_browser
def test_hostile_names_come_out_as_text(tmp_path: Path, open_page: Open) -> None:
    root = tmp_path / "<img src=x onerror=alert(2)>"
    for seed in (0, 1):
        write_run(root / f"{seed} <i>$x$", f"x={HOSTILE}", seed=seed, error=HOSTILE, level=0.01 * seed)
    write_run(root / "2", "x=_1$", status="failed", error=HOSTILE, values={HOSTILE: 1.0}, level=1)
    (root / "2" / "spectra.npz").write_text(HOSTILE)
    page = open_page(report(root))
    shown = " ".join(HOSTILE.split())
    assert shown in " ".join(cells(page, "#table", 1)[0].split())
    assert shown in " ".join(cells(page, "#runs", 8)[2].split())
    assert shlex.split(page.locator("#command").text_content() or "")[1] == f"x={HOSTILE}"
    assert page.evaluate("document.querySelectorAll('img, table i, b').length") == 0
    point = page.locator('[data-plot="plane"] .scatterlayer .points path').first
    point.hover(force=True)
    hover = page.locator('[data-plot="plane"] .hoverlayer')
    hover.locator("text").first.wait_for()
    # Plotly lays out spaces by itself.
    assert "".join(HOSTILE.split()).replace("\u2028", "") in "".join(hover.text_content().split())  # type: ignore[union-attr]


@needs_browser
def test_without_labels_everything_else_is_there(tmp_path: Path, open_page: Open) -> None:
    write_sweep(tmp_path, ["a=1", "a=2"], range(2), probes=False)
    page = open_page(report(tmp_path))
    assert "No accuracy was logged" in page.inner_text("header")
    color = page.evaluate("document.querySelector('[data-plot=plane]').layout.coloraxis.colorbar.title.text")
    assert color == "dynamics/ER_R"
    assert page.locator("#best").count() == 0
    assert cells(page, "#table", 3) == ["\N{EN DASH}"] * 2


@needs_browser
def test_one_accuracy_alone_has_no_scale_of_colors(tmp_path: Path, sweep: Path, open_page: Open) -> None:
    write_sweep(tmp_path, ["a=1"], [0])
    for path, scales in ((sweep, 1), (report(tmp_path), 0)):
        plane = open_page(path).locator('[data-plot="plane"]')
        plane.locator(".scatterlayer .points path").first.wait_for()
        assert plane.locator(".cbcoloraxis").count() == scales
    picture = draw_plane(Study(read_runs([tmp_path])[0]))
    assert picture is not None
    assert len(picture.axes) == 1


@needs_browser
def test_a_run_that_still_runs_is_in_the_plane_and_the_curves(tmp_path: Path, open_page: Open) -> None:
    write_sweep(tmp_path, ["a=1"], [0])
    write_run(tmp_path / "1", "a=2", status="running", columns=None, epochs=2, level=0.3)
    (tmp_path / "1" / ".lock").touch()
    page = open_page(report(tmp_path))
    assert {line["arm"] for line in lines(page, "plane")} == {0, 1}
    assert cells(page, "#table", 2) == ["1", "0 of 1"]


@needs_browser
def test_different_numbers_of_rows_are_said_on_the_page(tmp_path: Path, open_page: Open) -> None:
    write_run(tmp_path / "0", "a=1")
    write_run(tmp_path / "1", "a=2", values={"dynamics/log_n": 6.238})
    page = open_page(report(tmp_path))
    assert "compare I(R;Z) only between runs of equal n" in page.inner_text("#plane")


def test_runs_that_left_nothing_still_make_a_page(tmp_path: Path) -> None:
    write_run(tmp_path / "0", status="failed", error="no such data", columns={})
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "summary.json").write_text("{")
    text = report(tmp_path).read_text()
    assert "no such data" in text
    assert "No run has logged dynamics/H_R" in text
    assert "is not a summary of a run" in text


@needs_browser
def test_a_hundred_runs_open_quickly(tmp_path: Path, open_page: Open) -> None:
    write_sweep(tmp_path, [f"a={i}" for i in range(20)], range(5), epochs=60, width=512)
    path = report(tmp_path)
    assert path.stat().st_size < 8e6
    page = open_page(path)
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 3000
    # Time of the main thread, to which other processes add little.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    wait(page, PLANE_DRAWN)
    spent = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
    assert 0.1 < spent["TaskDuration"] < 5
    assert page.locator("#runs tbody tr").count() == 100


def test_figures_are_what_plotly_knows_and_json_without_nan(tmp_path: Path) -> None:
    write_sweep(tmp_path, ["a=1", "a=2"], range(2))
    columns = {"dynamics/H_R": [float("nan"), 1.0], "dynamics/I_RZ": [1.0, float("inf")]}
    write_run(tmp_path / "4", "a=3", epochs=2, columns=columns)
    study = Study(read_runs([tmp_path])[0])
    found = plots(study)
    assert found[0]["id"] == "plane"
    assert {"spectrum/R", "spectrum/Z", "balance/alpha", "loss/total", "probe/knn_top1"} <= {
        p["id"] for p in found
    }
    for plot in found:
        go.Figure(data=plot["data"], layout=plot["layout"])  # raises on a property that there is not
        json.dumps(plot, allow_nan=False)


def test_a_curve_is_the_mean_of_an_arm_in_a_band_of_one_standard_deviation(tmp_path: Path) -> None:
    for seed, end in enumerate((1.0, 3.0)):
        write_run(tmp_path / str(seed), "a=1", seed=seed, epochs=2, columns={"balance/alpha": [0.0, end]})
    (curve,) = (p for p in plots(Study(read_runs([tmp_path])[0])) if p["id"] == "balance/alpha")
    area, line = curve["data"]
    assert (line["x"], line["y"]) == ([1, 2], [0, 2])
    assert area["y"] == pytest.approx([0, 2 - 2**0.5, 2 + 2**0.5, 0], abs=1e-4)


def test_pictures_are_drawn_of_hostile_names_and_many_arms(tmp_path: Path) -> None:
    arms = [f"a={HOSTILE}", "_hidden=$1", *(f"b={i}" for i in range(30))]
    write_sweep(tmp_path, arms, [0], epochs=2)
    study = Study(read_runs([tmp_path])[0])
    pictures = write_pictures(study, tmp_path / "page.html")
    assert [picture.name for picture in pictures] == ["page_plane.png", "page_dynamics.png", "page_spectra.png"]
    for picture in pictures:
        pixels = imread(picture)
        assert min(pixels.shape[:2]) > 400
        assert np.std(pixels) > 0.05


def test_the_command_line_is_quoted_and_names_the_user_s_own_groups(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", "experiment=x", "+note='a b'", "resume=true")
    (folder / ".hydra").mkdir()
    sources = [{"path": "conf", "provider": "main"}, {"path": "/my groups", "provider": "command-line"}]
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"config_sources": sources}}}))
    (run,), _ = read_runs([folder])
    assert command_line(run) == ("""adadim-train --config-dir '/my groups' experiment=x "+note='a b'" seed=0""")
