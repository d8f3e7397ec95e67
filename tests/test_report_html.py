"""The report: one well-formed page with everything in it and nothing hostile from files."""

import copy
import itertools
import math
import re
from html import escape
from html.parser import HTMLParser

import pytest
import torch

from inversion.audit import html, page_view, page_words
from inversion.audit.verdict import IDENTIFIABLE, INCOMPLETE, NOT_SHOWN, RECONSTRUCTION
from tests.audit_examples import (
    EXAMPLES,
    GENUINE,
    audit,
    checkpoint,
    from_result,
    palettes,
    write_pictures,
)
from tests.support import scored
from utils.files import null_if_nan

VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
HOSTILE = "<script>alert('x')</script>&\"{{ 191 * 7 }}</style><img src=x onerror=y>"


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the text, ids, addresses and attributes."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.ids, self.attributes, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder with the pictures that the examples name."""
    path = tmp_path_factory.mktemp("audit")
    write_pictures(path)
    return path


@pytest.fixture(scope="module")
def pages(folder):
    """Example → its page, made once."""
    return {name: html.render(make(), folder, with_images=True) for name, make in EXAMPLES.items()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_page_is_well_formed_and_complete_in_itself(name, pages):
    page = Page(pages[name])
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for attribute, value in page.attributes:
        assert not attribute.startswith("on")
        if attribute in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#"))
            assert not value.startswith("#") or value[1:] in page.ids
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", pages[name])
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)


def test_the_checks_of_a_page_see_what_is_wrong():
    for wrong in ("<p><b></p></b>", "<p>", "</p>"):
        with pytest.raises(AssertionError):
            Page(wrong)


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_renderings_are_the_same_bytes(name, pages, folder):
    assert html.render(EXAMPLES[name](), folder, with_images=True) == pages[name]


def test_the_report_lies_in_the_folder(tmp_path, pages):
    write_pictures(tmp_path)
    path = html.write_report(EXAMPLES["leak"](), tmp_path, with_images=True)
    assert path == tmp_path / "report.html"
    assert path.read_text() == pages["leak"]


# What it says ------------------------------------------------------------------------------------


def numbers(value, path=()):
    """Every number of an audit, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def expected(path, value):
    """How the report should write a number."""
    key, inside = path[-1], set(path)
    if "seconds" in key:
        minutes, seconds = divmod(round(value), 60)
        if minutes:
            return f"{minutes} min" + (f" {seconds:02d} s" if seconds else "")
        return f"{value:.1f} s" if value < 10 and value % 1 else f"{seconds} s"
    if "leakage" in inside:
        return f"{value:+.2f}" if "psnr" in inside else f"{value:+.3f}"
    if {"mean", "controls"} & inside:
        return f"{value:.2f}" if key == "psnr" else f"{value:.3f}"
    if key in ("accuracy", "chance"):
        return f"{100 * value:.0f} %"
    if key in ("epsilon", "mu"):
        return f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:.2g}"
    return f"{value:,}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_number_of_the_audit_is_there(name, pages):
    text = Page(pages[name]).text
    found = [(path, value) for path, value in numbers(EXAMPLES[name]()) if path != ("format",)]
    assert len(found) > 5
    for path, value in found:
        if path[-2:] == ("labels", "chance") and "worked them out" not in text:
            continue  # to guess labels that were given is nothing to tell
        written = re.escape(expected(path, value))
        assert re.search(rf"(?<![\d.,]){written}(?![\d])", text), (path, value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_begins_with_the_verdict_and_its_limits(name, pages):
    found, text = EXAMPLES[name](), Page(pages[name]).text
    meaning = page_words.MEANINGS[found["verdict"]]
    several = len(found["checkpoints"]) > 1
    headline = meaning.several.format(count=3) if several else meaning.one
    first = f"{found['verdict']} {headline}"
    plain = page_view.audit_view(found, page_view.Path(), with_images=False)["plain"]
    plain = plain.removesuffix(".")  # with pictures, it goes on
    words = (first, plain, found["sentence"], meaning.limit, "1. The system")
    places = [text.index(part) for part in words]
    assert places == sorted(places)


def test_the_sections_come_in_their_order(pages):
    titles = re.findall(r"<h2>(\d+)\. ", pages["leak"])
    assert titles == [str(n) for n in range(1, 13)]


def test_several_updates_begin_with_a_table_of_all(pages):
    text = Page(pages["several"]).text
    assert text.index("The 3 updates") < text.index("Update 1:") < text.index("Update 3:")
    assert pages["several"].count("<h2>5. What leaked") == 3
    assert pages["several"].count("<h2>7. Warnings") == 1


def test_the_worst_of_several_stands_first():
    found = page_view.audit_view(EXAMPLES["several"](), None, with_images=False)
    assert found["shown"]["number"] == 2
    for verdict in (INCOMPLETE, "never heard of"):
        assert page_view.meaning_of(verdict, named=True).kind == "open"


def test_the_deciding_part_is_of_the_verdict_and_leaks_most():
    found = page_view.audit_view(EXAMPLES["leak"](), None, with_images=False)["shown"]
    assert found["decisive"]["name"] == "matching, long"
    assert found["highest"] == {"image": 0, "value": 0.939}
    weaker = page_view.decisive_part(found["parts"], "leakage: identifiable")
    assert weaker["name"] == "matching, short"
    assert page_view.decisive_part(found["parts"][2:], RECONSTRUCTION) is None


def test_no_sentence_is_told_twice():
    told = {"verdict": NOT_SHOWN, "sentence": f"{NOT_SHOWN}: p = 0.3"}
    assert page_view.news(told, f"{NOT_SHOWN}: by matching: p = 0.3; nothing else") is None
    assert page_view.news(told, f"{NOT_SHOWN}: p = 0.2") == told["sentence"]
    assert page_view.news(told, None) == told["sentence"]
    assert page_view.news({"verdict": None, "sentence": None}, "anything") is None


def shown(found):
    return page_view.audit_view(found, page_view.Path(), with_images=False)


def test_the_first_screen_counts_the_images_that_were_singled_out(folder):
    plain = "8 of 8 test images were singled out among 100 candidates each; the worst is image 0"
    assert shown(EXAMPLES["leak"]())["plain"] == f"{plain}."
    whole = page_view.audit_view(EXAMPLES["leak"](), folder, with_images=True)
    assert whole["plain"] == f"{plain}, shown here."
    one = EXAMPLES["leak"]()
    one["checkpoints"][0] |= {"identified": [3], "worst_image": 3}
    assert shown(one)["plain"].startswith("1 of 8 test images was singled out")
    assert shown(EXAMPLES["several"]())["plain"] == f"Update 2: {plain}."
    assert shown(EXAMPLES["no leak"]())["plain"].startswith("No test image was singled out")
    assert "not settled" in shown(EXAMPLES["incomplete"]())["plain"]


def test_traces_without_a_single_image_are_not_called_recognised(folder):
    found = EXAMPLES["leak"]()
    found["verdict"] = found["checkpoints"][0]["verdict"] = IDENTIFIABLE
    assert "can be recognised" in Page(html.render(found, folder, with_images=False)).text
    found["checkpoints"][0]["identified"] = []
    text = Page(html.render(found, folder, with_images=False)).text
    assert "influences the images measurably, but no single image was singled out" in text
    assert "recognised" not in text
    assert page_words.TRACES.one in text


def test_a_difference_is_not_labelled_as_a_likeness(pages):
    text = Page(pages["leak"]).text
    assert "PSNR above the best control, dB +22.30" in text
    assert "SSIM above the best control +0.939" in text
    assert not re.search(r'<th scope="row">(PSNR|SSIM)(, dB)?</th>', pages["leak"])


@pytest.mark.parametrize("name", GENUINE)
def test_a_warning_is_told_once_in_sentences(name):
    found = GENUINE[name]
    text = Page(html.render(found, page_view.Path(), with_images=False)).text
    section = text[text.index("7. Warnings") : text.index("8. Residual risk")]
    assert section.count("labels") == section.lower().count("demonstration") == 1
    assert not re.search(r"\. +[a-z]", section)
    for warning in found["warnings"]:
        assert warning["text"][1:] in section


def test_the_warning_about_an_attack_that_does_not_decide_is_minor():
    limited = [
        {"code": "optimiser-limited", "text": f"matching, {which} did not get enough time: more"}
        for which in ("short", "long")
    ]
    found = {name: {**copy.deepcopy(GENUINE[name]), "warnings": limited} for name in GENUINE}
    found["defended"]["checkpoints"][0]["parts"][1]["verdict"] = INCOMPLETE
    demo, defended = (
        {w["text"].partition(" did")[0]: w["rests"] for w in shown(found[name])["warnings"]}
        for name in ("demo", "defended")
    )
    assert demo["matching, short"] == ["matching, long"]
    assert demo["matching, long"] == []
    assert defended["matching, short"] == ["layerwise", "matching, long"]
    found = found["defended"]
    found["checkpoints"][0]["verdict"] = found["verdict"] = INCOMPLETE
    assert not any(w["minor"] for w in shown(found)["warnings"])


def test_a_metric_without_a_control_is_left_out():
    part = shown(GENUINE["demo"])["checkpoints"][0]["parts"][0]
    assert part["mean"]["mse"] > 0
    assert part["likeness"] == ["psnr", "ssim"]
    alone = copy.deepcopy(GENUINE["demo"])
    alone["checkpoints"][0]["parts"][0]["controls"] = {}
    assert shown(alone)["checkpoints"][0]["parts"][0]["likeness"] == ["mse", "psnr", "ssim"]


def test_what_is_missing_is_named(pages):
    text = Page(pages["incomplete"]).text
    for words in (
        "It was not recorded which parts leave", "Nothing was measured.", "None. The update",
        "skipped : the budget was used up", "interrupted", "failed", "not tested",
    ):  # fmt: skip
        assert words in text


def test_a_bound_for_every_attacker_is_told_with_its_numbers(pages):
    text = Page(pages["no leak"]).text
    assert "without the update does so with at most 0.092 after one" in text
    assert "one image more or less" in text
    assert "no bound" not in text
    assert "There is no bound" in Page(html.render(
        audit(NOT_SHOWN, [checkpoint(NOT_SHOWN, [none()], protection={"mode": "topk"})]),
        page_view.Path(), with_images=False)).text  # fmt: skip


def none():
    """A part in which nothing was found, of one image: it has no interval."""
    return EXAMPLES["no leak"]()["checkpoints"][0]["parts"][0]


def paths(value, path=()):
    """The paths to everything below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


def changed(found, path, value):
    found = copy.deepcopy(found)
    place = found
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return found


@pytest.mark.parametrize("absent", [None, KeyError])
def test_any_field_may_be_missing(absent, folder, monkeypatch):
    """And none of the page's words then comes from Python."""
    monkeypatch.setattr(html, "leakage_chart", lambda *_: "<svg></svg>")
    found = EXAMPLES["leak"]()
    found["checkpoints"][0]["protection"] = EXAMPLES["no leak"]()["checkpoints"][0]["protection"]
    named = [path for path in paths(found) if isinstance(path[-1], str)]
    assert len(named) > 100
    for path in named:
        text = Page(html.render(changed(found, path, absent), folder, with_images=True)).text
        assert not re.search(r"\b(None(?!\.)|nan|undefined|Undefined)\b", text), path


def test_a_number_that_is_not_finite_has_no_value(folder):
    found = EXAMPLES["leak"]()
    spread = found["checkpoints"][0]["parts"][0]["leakage"]["ssim"]
    spread |= {"low": math.nan, "high": math.inf, "images": [math.nan, *spread["images"][1:]]}
    page = Page(html.render(found, folder, with_images=True))
    assert not re.search(r"\b(nan|inf)\b", page.text)
    assert "(no interval)" in page.text
    assert "Highest leakage: SSIM +0.921 (image 1)" in page.text


def test_the_scores_of_a_run_can_be_told(folder):
    """As scoring makes them, with figures that are null."""
    true, other = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    decoys = torch.rand(2, 30, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(2)
    controls = {"mean image": other, "prior only": other / 2}
    scores, _ = scored(
        0.9 * true, true, labels, labels, controls=controls,
        decoys=(255 * decoys).round().byte(), verdict_metric="psnr",
    )  # fmt: skip
    scores["attack"] = {"arrived": True}
    seconds = {name: {"seconds": 1.5} for name in controls}
    result = {"metrics": scores, "controls": seconds, "seconds": 2.0, "iterations": 9}
    part = from_result(null_if_nan(result))
    found = audit(NOT_SHOWN, [checkpoint(part["verdict"], [part], batch_size=2)])
    text = Page(html.render(found, folder, with_images=True)).text
    assert part["sentence"] in text
    assert f"{part['leakage']['psnr']['mean']:+.2f} dB" in text
    assert "9 steps of the attack" in text


# Nothing hostile, nothing private ----------------------------------------------------------------


def with_hostile_texts(value, count):
    """The value with every text in it replaced, keys of free choice too; each gets a number."""
    free = ({"mean image", "prior only", "other gradient"}, {"python", "torch", "numpy"})
    if isinstance(value, dict):
        keep = set(value) not in free
        return {
            key if keep else f"{HOSTILE}{next(count)}.": with_hostile_texts(inner, count)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [with_hostile_texts(inner, count) for inner in value]
    return f"{HOSTILE}{next(count)}." if isinstance(value, str) else value


def test_every_text_of_a_file_is_escaped_and_shown(folder):
    found = EXAMPLES["leak"]()
    found["checkpoints"][0]["protection"] = EXAMPLES["no leak"]()["checkpoints"][0]["protection"]
    found["checkpoints"][0]["labels"] |= {"known": False, "accuracy": 0.5}
    for part in found["checkpoints"][0]["parts"]:
        part |= {"deepest_layer": "layer", "reason": "because"}
    count = itertools.count()
    hostile = with_hostile_texts(found, count)
    total = next(count)
    text = html.render(hostile, folder, with_images=True)
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("style") == 1
    assert "img" not in page.tags  # no such picture in the folder
    assert "1337" not in page.text
    assert text.count(str(escape("<script>alert("))) > 50
    shown = {int(n) for n in re.findall(r"onerror=y>(\d+)\.", page.text)}
    hidden = set(range(total)) - shown
    assert total > 60
    named = [where for where, words in texts(hostile) if int(words[len(HOSTILE) : -1]) in hidden]
    # Names of pictures, the verdict that stands at the top, the layer of a part that was refused.
    assert {where[-1] for where in named} <= {"worst", "pairs", "verdict", "deepest_layer"}


def texts(value, path=()):
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from texts(inner, (*path, key))
    elif isinstance(value, str):
        yield path, value


def test_without_images_there_is_no_pixel(folder, pages):
    assert "data:image" in pages["leak"]
    for make in EXAMPLES.values():
        page = html.render(make(), folder, with_images=False)
        assert "base64" not in page
        assert "img" not in Page(page).tags
        assert "Picture withheld" in page


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "notes.png", "absent.png", ""])
def test_only_a_picture_of_the_folder_is_shown(name, tmp_path):
    inner = tmp_path / "run"
    inner.mkdir()
    write_pictures(inner)
    (inner / "worst-0.png").rename(tmp_path / "secret.png")
    (inner / "notes.png").write_text("not a picture")
    found = EXAMPLES["leak"]()
    found["checkpoints"][0]["pictures"]["worst"] = name
    page = html.render(found, inner, with_images=True)
    assert "<img" not in page
    assert "No picture" in page


# Colours and words -------------------------------------------------------------------------------


def luminance(colour):
    """The relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_contrasts_reach_level_aa(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = palettes()[scheme]
    for ground in ("paper", "soft", "mark"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
        assert contrast(colours["muted"], colours[ground]) >= 4.5
    assert contrast(colours["link"], colours["paper"]) >= 4.5
    assert contrast(colours["bar"], colours["paper"]) >= 3
    for badge in ("leak", "trace", "none", "open"):
        assert contrast("#ffffff", colours[badge]) >= 4.5


def test_every_verdict_has_a_meaning_and_a_sign_of_its_own():
    kinds = [meaning.kind for meaning in page_words.MEANINGS.values()]
    assert len(set(kinds)) == 4
    template = (html.TEMPLATES / "checkpoint.html.j2").read_text()
    assert all(f'kind == "{kind}"' in template for kind in kinds if kind != "open")


def test_the_terms_name_the_attacks_and_controls_of_a_suite():
    assert len(page_words.GLOSSARY) <= 10
    terms = " ".join(f"{term} {meaning}" for term, meaning in page_words.GLOSSARY)
    parts = GENUINE["demo"]["checkpoints"][0]["parts"]
    words = {"gradient", *(p["method"] for p in parts), *(c for p in parts for c in p["controls"])}
    assert len(words) == 7
    assert all(word in terms for word in words)


def test_the_documentation_has_the_same_references():
    page = (html.TEMPLATES.parents[2] / "docs" / "report.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert rows == [(str(r.section), r.item, r.edpb, r.iso, r.nist) for r in page_words.REFERENCES]
