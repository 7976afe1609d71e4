"""The page of an evaluation in a browser without a network: what is seen, and which slices the viewer shows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from browser import CHROMIUM, Browser
from ccella_fast.report.evaluation import write_evaluation_page
from ccella_fast.report.viewer import _niivue
from evaluation_page_fixtures import SHAPE, pelvis, write_evaluation

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian's package chromium)"),
    pytest.mark.skipif(_niivue() is None, reason='ipyniivue is not installed: pip install -e ".[test]"'),
]

LOADED = "[...document.images].every((image) => image.complete && image.naturalWidth > 100) && document.images.length"
READY = "document.getElementById('viewer').dataset.ready === 'yes'"
SLICE = "Number(document.getElementById('viewer').dataset.slice)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_evaluation_page(write_evaluation(tmp_path_factory.mktemp("evaluation")))


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Browser]:
    with Browser() as opened:
        opened.open(page)
        opened.wait_for(READY)
        yield opened


def panes(browser: Browser) -> list[np.ndarray]:
    """What is drawn in the frames of the viewer, in gray levels 0 to 255, without the letters at their borders."""
    from matplotlib.image import imread

    browser.evaluate("document.getElementById('viewer').scrollIntoView()")
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    seen = imread(io.BytesIO(browser.screenshot()))[..., :3].mean(-1) * 255
    script = "[...document.querySelectorAll('.frame')].map((frame) => { const box = frame.getBoundingClientRect(); " \
             "return [box.left, box.top, box.width, box.height]; })"  # fmt: skip
    boxes = [[round(value) for value in box] for box in browser.evaluate(script)]
    return [seen[top : top + height, left : left + width] for left, top, width, height in boxes]


def go_to(browser: Browser, plane: str, place: int) -> None:
    browser.evaluate(f"document.getElementById('viewer-plane').value = '{plane}'")
    browser.evaluate("document.getElementById('viewer-plane').dispatchEvent(new Event('change'))")
    browser.evaluate(f"document.getElementById('viewer-slice').value = {place}")
    browser.evaluate("document.getElementById('viewer-slice').dispatchEvent(new Event('input'))")


def test_nothing_is_complained_about_or_asked_for(browser: Browser):
    assert browser.evaluate(LOADED) == 5
    assert browser.evaluate("document.getElementById('viewer-notice').hidden")
    assert not browser.evaluate("document.getElementById('viewer').hidden")
    assert (browser.messages, browser.requests) == ([], [])


@pytest.mark.parametrize(("plane", "axis"), [("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_the_viewer_shows_each_plane_as_radiologists_see_it(browser: Browser, plane: str, axis: int):
    """The bright corner is right, front and head: in every plane it is at the top left."""
    place = SHAPE[axis] - 6 + 4 * (axis == 2)
    go_to(browser, plane, place)
    for pane, kind in zip(panes(browser), ("real", "reconstructed", "synthetic"), strict=True):
        pixels = np.moveaxis(pelvis(1, kind), axis, 0)[place][
            ::-1, ::-1
        ].T  # rows from the head or front, columns from the left
        size = [len(pane) * length / max(extents(axis)) for length in reversed(extents(axis))]
        top, left = (round((len(pane) - length) / 2) for length in size)
        for row, column in ((0.55, 0.5), (0.55, 0.15), (0.2, 0.85), (corner(axis, 1), corner(axis, 0))):
            seen = patch(pane, top + row * size[0], left + column * size[1], 3)
            meant = 255 * patch(pixels, row * pixels.shape[0], column * pixels.shape[1], 1)
            assert seen == pytest.approx(meant, abs=14), (plane, kind, row, column)
        bright = patch(pane, top + corner(axis, 1) * size[0], left + corner(axis, 0) * size[1], 3)
        assert bright > 240


def extents(axis: int) -> list[float]:
    """Width and height of a slice in mm."""
    return [
        size * step for place, (size, step) in enumerate(zip(SHAPE, (2.25, 2.25, 3.0), strict=True)) if place != axis
    ]


def corner(axis: int, which: int) -> float:
    """Where the middle of the bright corner is, from the left or from the top, as a share."""
    along = [place for place in range(3) if place != axis][which]
    return {2: 2 / 16}.get(along, 7 / 64)


def patch(pixels: np.ndarray, row: float, column: float, half: int) -> float:
    return float(pixels[int(row) - half : int(row) + half + 1, int(column) - half : int(column) + half + 1].mean())


def test_the_wheel_turns_slices_once_an_image_was_clicked(browser: Browser):
    go_to(browser, "axial", 8)
    browser.evaluate("document.activeElement.blur()")
    before = panes(browser)
    box = browser.evaluate("JSON.parse(JSON.stringify(document.querySelector('.frame').getBoundingClientRect()))")
    left, top = box["left"] + 40, box["top"] + 40
    browser.wheel(left, top, 100)
    browser.wait_for(
        f"document.querySelector('.frame').getBoundingClientRect().top < {box['top']} - 50"
    )  # the page was scrolled
    assert browser.evaluate(SLICE) == 8
    browser.evaluate("document.getElementById('viewer').scrollIntoView()")
    browser.click(left, top)
    for _ in range(5):
        browser.wheel(left, top, 100)
    browser.wait_for(f"{SLICE} === 13")
    assert browser.evaluate("document.getElementById('viewer-place').value") == "slice 14 of 16"
    for one, other in zip(before, panes(browser), strict=True):
        assert np.abs(one - other).max() > 80  # the bright corner has appeared
    browser.wheel(left, top, -100)
    browser.wait_for(f"{SLICE} === 12")
    assert (browser.messages, browser.requests) == ([], [])


def test_other_volumes_can_be_chosen(browser: Browser):
    go_to(browser, "axial", 8)
    first = panes(browser)
    browser.evaluate("document.getElementById('viewer-case').value = 1")
    browser.evaluate("document.getElementById('viewer-case').dispatchEvent(new Event('change'))")
    browser.wait_for("document.querySelector('.pane figcaption').textContent === 'Phantom 2'")
    go_to(browser, "axial", 8)
    assert all(np.abs(one - other).mean() > 1 for one, other in zip(first, panes(browser), strict=True))
    assert browser.messages == []


def test_without_webgl_the_montage_remains_and_says_so(page: Path):
    with Browser(width=420, webgl=False) as narrow:
        narrow.open(page)
        assert narrow.evaluate(LOADED) == 5
        assert narrow.evaluate(
            "document.getElementById('viewer').hidden && !document.getElementById('viewer-notice').hidden"
        )
        assert narrow.evaluate("document.documentElement.scrollWidth") == 420  # what is wider scrolls on its own
        assert (narrow.messages, narrow.requests) == ([], [])


def test_the_policy_stops_scripts_and_pictures_from_elsewhere(page: Path):
    """Negative control of the tests above: what is complained about or asked for is seen."""
    text = page.read_text(encoding="utf-8").replace(
        "</main>", '<img src="http://127.0.0.1:9/x.png"><script>document.title = "changed"</script></main>'
    )
    changed = page.with_name("changed.html")
    changed.write_text(text, encoding="utf-8")
    with Browser(webgl=False) as other:
        other.open(changed)
        assert other.evaluate("document.title") == "ccella_fast: evaluation"
        complaints = [each for each in other.messages if "Content Security Policy" in each]
        assert any("img-src" in each for each in complaints) and any("script-src" in each for each in complaints)
        changed.write_text(text.replace("Content-Security-Policy", "nothing"), encoding="utf-8")
        other.open(changed)
        assert other.evaluate("document.title") == "changed" and other.requests
