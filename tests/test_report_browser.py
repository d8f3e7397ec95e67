"""The report in a headless browser: first screen, colours, printed pages, no request."""

import json

import numpy
import pytest
from PIL import Image

from inversion.audit import html
from tests.audit_examples import EXAMPLES, GENUINE, palettes, write_pictures
from tests.browser import SCREEN, measured, open_page, pdf_pages, screenshot

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Example → the file of its page."""
    path = tmp_path_factory.mktemp("pages")
    write_pictures(path)
    files = {}
    for name, found in ({name: make() for name, make in EXAMPLES.items()} | GENUINE).items():
        files[name] = path / f"{name.replace(' ', '-')}.html"
        files[name].write_text(html.render(found, path, with_images=True))
    return files


def share(picture, colour, box):
    """The share of the pixels of a box (left, top, right, bottom) that are near a colour."""
    pixels = numpy.asarray(Image.open(picture).convert("RGB").crop(box), dtype=int)
    goal = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(pixels - goal).max(axis=2) <= 6).mean()


BOXES = """['verdict', 'worst'].map(id => {
    const box = document.getElementById(id).getBoundingClientRect()
    return [box.left, box.top, box.right, box.bottom]
})"""


@pytest.mark.parametrize("name", ["leak", "several", "incomplete"])
def test_verdict_and_worst_image_are_on_the_first_screen(name, written, tmp_path):
    for left, top, right, bottom in json.loads(measured(written[name], tmp_path, BOXES)):
        assert 0 <= left < right <= SCREEN[0]
        assert 0 <= top < bottom <= SCREEN[1]
        assert right - left > 100


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_screen_shows_the_verdict_in_its_colour(dark, written, tmp_path):
    badge, worst = json.loads(measured(written["leak"], tmp_path, BOXES))
    colours = palettes()["dark" if dark else "light"]
    picture, console = screenshot(written["leak"], tmp_path, dark=dark)
    assert console == []
    assert Image.open(picture).size == SCREEN
    assert share(picture, colours["leak"], badge) > 0.5
    assert share(picture, colours["leak"], worst) < 0.1
    assert share(picture, colours["paper"], (0, 0, *SCREEN)) > 0.5
    left, top, right, _ = worst
    assert numpy.asarray(Image.open(picture).crop((left, top, right, top + 150))).std() > 30


@pytest.mark.parametrize("name", ["leak", "no leak", *GENUINE])
def test_it_prints_on_two_pages(name, written, tmp_path):
    assert pdf_pages(written[name], tmp_path) == 2


RESOURCES = (
    "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
)


def test_the_page_asks_for_nothing(written, tmp_path):
    """Not even without the rule against it that the page carries."""
    assert measured(written["several"], tmp_path, RESOURCES) == "0"
    asking = tmp_path / "asking.html"
    image = '<img src="http://somewhere.invalid/x.png"><main>'
    asking.write_text(written["several"].read_text().replace("<main>", image))
    assert measured(asking, tmp_path, RESOURCES) == "1"
    _, console = open_page(asking, tmp_path, "--dump-dom")
    assert any("Content Security Policy" in line for line in console)
