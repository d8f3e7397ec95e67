"""Writes report.html: an audit as one page for readers who know no machine learning."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from inversion.audit import page_view, page_words
from inversion.audit.page_chart import leakage_chart
from utils.files import whole_file

TEMPLATES = Path(__file__).parent / "page"
REPORT = "report.html"
#: Filter of the templates → the function that it calls.
FILTERS = {
    "leakage": page_view.leakage_text,
    "interval": page_view.interval_text,
    "quality": page_view.quality_text,
    "probability": page_view.probability_text,
    "number": page_view.number_text,
    "time": page_view.time_text,
    "moment": page_view.moment_text,
    "sentences": page_view.sentences,
    "image_list": page_view.image_list,
}


def write_report(audit: Mapping, folder: Path, *, with_images: bool) -> Path:
    """Write the report of an audit into its folder and return the path of `report.html`.

    audit, folder, with_images: as in `render`. Raises FaultError if it cannot be written.
    """
    page = render(audit, folder, with_images=with_images)
    path = folder / REPORT
    with whole_file(path, text=True) as file:
        file.write(page)
    return path


def render(audit: Mapping, folder: Path, *, with_images: bool) -> str:
    """Return an audit as one HTML page that needs no other file and no network.

    audit: what audit.json holds; a field that is absent or None is said to be not recorded.
    folder: where the pictures that it names lie. with_images: whether the page shows them; without,
    it says that they are withheld, and holds no pixel of an image. Every text is escaped.
    """
    view = page_view.audit_view(audit, folder, with_images=with_images)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            audit=view,
            words=page_words,
            chart=_chart,
            style=Markup((TEMPLATES / "style.css").read_text()),
            with_images=with_images,
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= FILTERS
    return environment


def _chart(checkpoint: Mapping) -> Markup:
    """Draw the leakage of a checkpoint with a decisive part; the drawing holds no file's text."""
    part, metric = checkpoint["decisive"], checkpoint["metric"]
    others = [
        other
        for other in checkpoint["parts"]
        if other is not part and page_view.metric_of(other) == metric
    ]
    return Markup(leakage_chart(part, others, metric, f"chart-{checkpoint['number']}"))
