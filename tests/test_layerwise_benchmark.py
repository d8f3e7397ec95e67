"""benchmarks/layerwise.py: its cases, columns, identified images, picture over batch sizes."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import layerwise as benchmark
from benchmarks.layerwise_cases import CASES, CURVE, IMPOSSIBLE, LARGE, Case
from benchmarks.layerwise_curve import draw_curve, means
from benchmarks.layerwise_rows import FURTHER, SMALL, files, write
from benchmarks.layerwise_scores import decoys, depth, identification, labels, pixels, ranks
from benchmarks.layerwise_tables import markdown
from inversion.layerwise.attack import layerwise_attack
from models.build import build_model
from tests.support import ROOT, photos, target_of
from train.photos import photo_batch

TINY = Case("lenet", 16, 2, index=10, head="keep")
#: What a case without matching, without a decoder or without a control has no figure of.
MATCHING = [name for name in (*SMALL, *FURTHER) if name.startswith("matching_")]
DECODER = ["decoder_only_psnr", "decoder_only_ssim"]


@pytest.fixture(scope="module")
def measured():
    """Row and tensors' rows of two images of a lenet, whose gradient is solved."""
    row, tensors, _ = benchmark.run(TINY, None)
    return row, tensors


def read(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


# Columns -----------------------------------------------------------------------------------------


def test_every_column_is_measured_and_none_is_lost(measured, tmp_path):
    row, tensors = measured
    assert {*row, "part", "number", *MATCHING, *DECODER} == {*SMALL, *FURTHER}
    for part in ("curve", "eval"):
        write(part, 3, row, tensors, tmp_path)
    large, small = (read(tmp_path / files(part)[0])[0] for part in ("curve", "eval"))
    assert [*large] == [*SMALL, *FURTHER]
    assert (large["part"], large["number"], small["part"]) == ("curve", "3", "eval")
    assert {name for name in large if large[name] == ""} == {*MATCHING, *DECODER, "stopped"}
    for part, further in (("eval", []), ("curve", ["classes_used"])):
        name = files(part)[1]
        kept, old = read(tmp_path / name), read(ROOT / "docs/rows/layerwise_tensors.csv")
        assert {*kept[0]} == {*old[0], *further}
        assert [*map(float, (r["rank"] for r in kept))] == [r["rank"] for r in tensors]


def test_the_committed_rows_have_the_columns_of_small_parts():
    assert [*read(ROOT / "docs/rows" / files("eval")[0])[0]] == [*SMALL]
    assert {files(part)[0] for part in LARGE} == {"layerwise_large.csv"}
    assert {*LARGE} < {*CASES}


def test_a_solved_case_says_how_far_the_walk_came(measured):
    row, _ = measured
    expected = {
        "source": "input_1", "depth": 4, "depth_of": 4, "share": 1.0, "pixels": 1.0,
        "identified": 2, "identified_ranks": "1 1", "identified_same": 2, "labels": 2,
        "labels_right": 2, "labels_read": False, "classes_used": 0,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected


def test_depth_counts_the_tensors_that_layers_take():
    torch.manual_seed(0)
    model = build_model("lenet", 8, (3, 16, 16))
    x, y = photos(2, 16, target_idx=10)
    found = layerwise_attack(model, target_of(model, x, y, arch="lenet"), y, x)
    for place, layer in enumerate(found.layers, 1):
        part = replace(found, method="activations", sources=(layer.name,))
        expected = {"source": layer.name, "depth": place, "depth_of": 4, "pixels": 0.0}
        expected["share"] = found.tensors[layer.name][0].numel() / x[0].numel()
        assert depth(model, part, (3, 16, 16)) == expected
    uncertified = replace(found, method="decoder", sources=("_6",))
    assert depth(model, uncertified, (3, 16, 16)) | {"depth_of": 0} == {
        "source": "", "depth": 0, "depth_of": 0, "share": 0.0, "pixels": 0.0,
    }  # fmt: skip


def test_pixels_are_determined_by_solving_or_by_enough_pooled_values():
    found = SimpleNamespace(
        method="stem", sources=("pool",), images=torch.rand(2, 3, 4, 4),
        tensors={"pool": torch.rand(2, 12, 2, 2)}, residual=torch.tensor([0.1, 0.5]),
    )  # fmt: skip
    assert pixels(found) == 0.5
    found.tensors = {"pool": torch.rand(2, 11, 2, 2)}
    assert pixels(found) == 0
    assert pixels(SimpleNamespace(method="solved")) == 1
    assert pixels(SimpleNamespace(method="activations")) == 0


def test_labels_are_counted_with_their_repeats():
    true, given = torch.tensor([1, 1, 2, 5]), torch.tensor([5, 1, 1, 2])
    none = SimpleNamespace(labels=None)
    assert labels(none, given, true) == {"labels": 3, "labels_read": False, "labels_right": 4}
    read_off = SimpleNamespace(labels=torch.tensor([1, 5, 5, 0]))
    assert labels(read_off, given, true) == {"labels": 3, "labels_read": True, "labels_right": 2}


# Cases -------------------------------------------------------------------------------------------


def test_a_client_repeats_its_labels_and_has_no_control_where_none_is_asked_for():
    of = benchmark.client(replace(TINY, batch=8, classes_used=5, control=False), None)
    assert len(set(of.y.tolist())) == 5
    assert of.y[5:].tolist() == of.y[:3].tolist()
    assert of.other is None
    assert len(set(benchmark.client(replace(TINY, batch=8), None).y.tolist())) == 8


def test_a_case_without_control_has_empty_cells():
    row, *_ = benchmark.run(replace(TINY, batch=1, control=False), None)
    assert "other_gradient_psnr" not in row
    assert row["mean_image_psnr"] < row["psnr"]


def test_some_cases_of_a_part_run(tmp_path, monkeypatch, capsys):
    cases = [replace(TINY, batch=1, control=False, seed=seed) for seed in (0, 1, 2)]
    monkeypatch.setitem(CASES, "224", cases)
    assert benchmark.chosen("224", None) == [*enumerate(cases)]
    benchmark.main(["224", "--only", "2,1", "--list"])
    assert capsys.readouterr().out == f"2: {cases[2]}\n1: {cases[1]}\n"
    benchmark.main(["224", "--only", "2", "--rows", str(tmp_path)])
    (row,) = read(tmp_path / "layerwise_large.csv")
    assert (row["number"], row["seed"], row["control"]) == ("2", "2", "False")
    assert {r["seed"] for r in read(tmp_path / "layerwise_large_tensors.csv")} == {"2"}
    with pytest.raises(SystemExit, match="--only 3: part 224 has the cases 0 to 2"):
        benchmark.main(["224", "--only", "0,3"])


def test_an_attack_ends_when_its_time_is_over():
    row, tensors, _ = benchmark.run(replace(TINY, control=False), None, cpu_seconds=0)
    assert row["stopped"] == "interrupted; ended after 0 CPU s"
    assert len(tensors) == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 8 bytes")])
def test_a_case_that_needs_too_much_memory_is_a_row(error, tmp_path, monkeypatch):
    def run(*_):
        raise error

    monkeypatch.setattr(benchmark, "run", run)
    row, tensors, images = benchmark.attempt(TINY, None, 1.0, 1000.0)
    assert row == vars(TINY) | {"stopped": "skipped: it needs more than 1000 GiB"}
    assert not tensors
    assert not images
    write("curve", 0, row, tensors, tmp_path)
    (kept,) = read(tmp_path / "layerwise_large.csv")
    assert (kept["psnr"], kept["arch"]) == ("", "lenet")
    assert markdown([kept]).splitlines()[-1] == "| lenet, eval, batch 10 | 16 | 2 | 1 | skipped |"
    with pytest.raises(type(error)):
        benchmark.attempt(TINY, None, 1.0, None)


def test_another_error_is_raised(monkeypatch):
    def run(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(benchmark, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        benchmark.attempt(TINY, None, 1.0, 1000.0)


# Identification ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """Six images of three labels, and their decoys."""
    true, y = photo_batch(6, 10, 16, seed=0, distinct_labels=3)
    return true, y, decoys(y, 16, 0)


def test_decoys_are_of_the_photograph_that_they_say(batch):
    """Those of images of one label are the same, and none is a crop of the batch."""
    true, y, among = batch
    for kind in (among.others, among.same):
        assert kind.shape == (6, 99, 3, 16, 16)
        assert kind.dtype == torch.uint8
        assert torch.equal(kind[0], kind[3])
        assert not torch.equal(kind[0], kind[1])
        apart = torch.cdist(true.flatten(1), kind[0].flatten(1).float() / 255)
        assert apart.min() > 0.1
    colours = true[:3].mean((2, 3))
    for i in range(3):  # a photograph's crops have its colours
        same, others = (
            (kind[i].float().mean((2, 3)) / 255 - colours[i]).norm(dim=1).mean()
            for kind in (among.same, among.others)
        )
        assert same < others
    assert torch.equal(decoys(y, 16, 0, count=5).same, among.same[:, :5])
    assert not torch.equal(decoys(y, 16, 1, count=5).same, among.same[:, :5])


def test_perfect_images_are_identified_whatever_their_order_in_a_class(batch):
    true, y, among = batch
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    row = identification("", true[order], y[order], true, y, among)
    assert row == {
        "identified": 6, "identified_ranks": "1 1 1 1 1 1",
        "identified_same": 6, "identified_same_ranks": "1 1 1 1 1 1",
    }  # fmt: skip


def test_other_images_are_not_identified(batch):
    true, y, among = batch
    other, _ = photo_batch(6, 11, 16, seed=0, distinct_labels=None)
    row = identification("of_", other, y, true, y, among)
    assert row["of_identified"] <= 1
    assert row["of_identified_same"] <= 1
    assert [*map(int, row["of_identified_ranks"].split())] == ranks(other, y, true, y, among.others)
    grey = torch.full_like(true, 0.5)
    tied = among.same[:, :1].expand(-1, 99, -1, -1, -1)
    own = (true * 255).round().byte()[:, None].expand_as(tied)
    assert ranks(grey, y, true, y, own) == [100] * 6  # ties count against


# The picture over batch sizes --------------------------------------------------------------------


def curve_rows():
    row = dict.fromkeys((*SMALL, *FURTHER), "") | {"part": "curve", "arch": "resnet18"}
    for case in CASES["curve"]:
        found = row | {name: str(value) for name, value in vars(case).items()}
        if case.batch < 32:
            found |= {"psnr": str(40 / case.batch), "depth": str(17 // case.batch)}
            found |= {"depth_of": "18", "mean_colour_psnr": "15"}
        yield found


def test_the_curve_is_drawn_small_enough_for_a_page(tmp_path, capsys):
    rows, path = [*curve_rows()], tmp_path / "curve.png"
    draw_curve(rows, path)
    assert Image.open(path).size == (800, 600)
    assert path.stat().st_size < 100_000
    drawn = Image.open(path).convert("RGB").getcolors(2**20)
    draw_curve([row for row in rows if row["size"] == "32"], path)
    assert len(Image.open(path).convert("RGB").getcolors(2**20)) < len(drawn)
    path.unlink()
    draw_curve([row | {"trained": "True"} for row in rows], path)
    said = "no picture: there are no measured rows of the curve's settings\n"
    assert capsys.readouterr().out == said
    assert not path.exists()


def test_the_curve_measures_every_setting_once():
    parts = ("224", "train-large", "curve")
    settings = [
        (c.size, c.batch, c.train_mode) for part in parts for c in CASES[part] if not c.seed
    ]
    wanted = {(size, b, mode) for size, of in CURVE.items() for b in of for mode in (False, True)}
    assert len(settings) == len({*settings})
    assert {*settings} == wanted - IMPOSSIBLE


def test_means_leave_out_what_was_not_measured():
    rows = [{"batch": b, "psnr": p} for b, p in (("8", "3"), ("2", "4"), ("2", "6"), ("16", ""))]
    assert means(rows, "psnr") == [(2, 5.0), (8, 3.0)]


def test_the_table_of_large_parts_sums_over_seeds(measured, tmp_path):
    for seed in (0, 1):
        write("224", seed, measured[0] | {"seed": seed}, [], tmp_path)
    lines = markdown(read(tmp_path / "layerwise_large.csv")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = dict(zip(cells[0], cells[2], strict=True))
    assert len(lines) == 3
    assert table["identified"] == table["in its photograph"] == "4/4"
    assert table["labels right"] == "4/4, given"
    assert (table["seeds"], table["classes"], table["pixels determined"]) == ("2", "2", "1.00")
    assert "matching" not in table
