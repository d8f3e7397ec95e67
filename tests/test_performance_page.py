"""docs/performance.md is what its rows say, whatever they say."""

import csv

import pytest

from benchmarks import shares
from benchmarks.performance_page import DOCS, PAGE, SECTIONS, page
from benchmarks.performance_rows import figure, quartiles, read, spread, verdict
from benchmarks.shares import IMPORTS, OTHER, place_of


def write(folder, name, *rows):
    """Write rows, dicts with the same keys, as a CSV file."""
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_page_is_what_the_command_writes():
    """`make docs` writes it."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_missing_file_is_told(section, tmp_path):
    text = section(tmp_path)
    assert ("Not measured on a GPU" if section.__name__ == "gpu" else "Not measured:") in text
    assert "nan" not in text


def test_rows_of_a_cpu_are_no_measurement_on_a_gpu(tmp_path):
    write(tmp_path, "gpu_step.csv", {"device": "cpu (1 threads)", "way": "exact"})
    (gpu,) = (section for section in SECTIONS if section.__name__ == "gpu")
    assert "Not measured on a GPU" in gpu(tmp_path)


def test_rows_of_a_gpu_say_which_way_is_fastest(tmp_path):
    always = {"device": "a GPU", "arch": "resnet50", "size": 224, "batch": 8, "mode": "train",
              "peak_mib": 900, "share_of_matmul": 0.5}  # fmt: skip
    write(
        tmp_path, "gpu_step.csv",
        *(always | {"way": way, "median_ms": ms, "lower_quartile_ms": ms, "upper_quartile_ms": ms,
                    "note": note}
          for way, ms, note in (("plain", 90, ""), ("exact, graph", 30, ""),
                                ("exact", "", "out of memory"))),
    )  # fmt: skip
    (gpu,) = (section for section in SECTIONS if section.__name__ == "gpu")
    text = gpu(tmp_path)
    assert "the fastest is exact, graph: 3.0 times as fast as plain" in " ".join(text.split())
    assert "out of memory" in text
    assert "Not measured" not in text


def peers_rows(folder, ratio, psnr):
    """Write rows of two methods, of which `exact` takes `ratio` of the other's time."""
    task = {"network": "lenet", "px": 32, "B": 8, "mode": "train", "box": "off"}
    rows = []
    for method, by in (("breaching", 1.0), ("exact", ratio)):
        row = task | {"method": method, "note": "", "ms per step": 10 * by}
        row |= {"lower quartile": 9 * by, "upper quartile": 11 * by, "evaluations": 40}
        for name in ("ratio", "cpu ratio"):
            row |= {f"{name} to breaching": by, f"lower quartile of {name}": by - 0.01,
                    f"upper quartile of {name}": by + 0.01}  # fmt: skip
        row |= {"iterations": 40, "peak resident MiB": "", "peak allocated MiB": 3.0}
        rows.append(row)
    left_out = dict.fromkeys(rows[0], "") | task | {"method": "other", "note": "left out: absent"}
    write(folder, "peers.csv", *rows, left_out)
    write(
        folder, "peers_images.csv",
        *(task | {"start": 0, "method": method, "equal": equal, "iterations": 40, "psnr": value,
                  "distance": 1e-6, "mean colour psnr": 15.0}
          for method, value in (("breaching", 19.0), ("exact", psnr))
          for equal in ("iterations", "time")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "psnr", "said"),
    [
        (0.5, 20.0, ("faster; within the aim", "exact is highest", "1.0 dB above breaching")),
        (1.5, 17.0, ("slower; above the aim", "breaching is highest", "2.0 dB below breaching")),
        (1.0, 10.0, ("not clearly different; above the aim", "9.0 dB below breaching")),
    ],
)
def test_comparisons_follow_from_the_rows(ratio, psnr, said, tmp_path):
    peers_rows(tmp_path, ratio, psnr)
    text = " ".join(page(tmp_path).split())
    for words in (*said, "left out: absent", "Images of 1 start,"):
        assert words in text


def test_numbers_are_written_short():
    written = {0.0: "0", 0.0312: "0.0312", 0.5: "0.5", 1.0: "1.00", 12.345: "12.3",
               1234.0: "1,230"}  # fmt: skip
    assert {value: figure(value) for value in written} == written
    assert figure(float("nan")) == "–"
    assert spread(*quartiles([1.0, 2.0, 3.0])) == "2.00 (1.50–2.50)"
    assert verdict(*quartiles([0.5])) == "not repeated"
    assert [verdict(1, *ends) for ends in ((0.7, 0.9), (1.1, 1.2), (0.9, 1.1))] == [
        "faster", "slower", "not clearly different"
    ]  # fmt: skip


def test_a_stack_has_a_stage_and_a_place():
    root = "/project"
    attack = [(f"{root}/run.py", "main"), (f"{root}/inversion/optimise.py", "improve")]
    step = [*attack, (f"{root}/inversion/pixel_gradient.py", "exact")]
    library = (f"{root}/.venv/lib/site-packages/torch/nn.py", "forward")
    assert place_of([*step, library], root) == ("step", "inversion/pixel_gradient.py: exact")
    assert place_of(attack, root)[0] == "loop around the step"
    control = (f"{root}/inversion/audit/controls.py", "run_controls")
    assert place_of([control, *step], root)[0] == "controls"
    loader = ("<frozen importlib._bootstrap>", "_find_and_load")
    assert place_of([*attack, loader, library], root) == (IMPORTS, "torch")
    assert place_of([attack[0], loader], root)[0] == IMPORTS
    assert place_of([attack[0]], root) == (OTHER, "run.py: main")
    assert place_of([], root) == (OTHER, "")


def test_every_file_of_a_stage_exists():
    for files in shares.STAGES.values():
        for name in files:
            assert (DOCS.parent / name).exists()


def test_looks_count_the_time_that_passes():
    with shares.Looks() as looks:
        sum(range(3_000_000))
    whole = sum(values[0] for values in looks.seconds.values())
    assert whole > 0.01


def test_the_rows_of_the_page_are_read(tmp_path):
    assert read(tmp_path, "absent.csv") == []
    assert read(DOCS / "rows", "startup.csv")[0]["command"] == "import torch"
