"""Writes docs/performance.md from the committed rows alone.

    python -m benchmarks.performance_page

`make docs` runs it after rows changed; a test compares the page with what this file makes. Every
number and every comparison of the page is computed from rows; where a file of rows is missing, the
page says so.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.performance_rows import (
    Row,
    figure,
    groups,
    median,
    missing,
    numbers,
    paragraph,
    percent,
    quartiles,
    read,
    spread,
    table,
    verdict,
)
from benchmarks.shares import ATTACKS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "performance.md"
#: What a step may take of breaching's: the aim.
AIM = 0.75
#: Files of benchmarks.pixel_gradient, by network: pixels and images.
PIXEL_GRADIENTS = {"convnet": (32, 8), "resnet18": (32, 8), "resnet50": (64, 4)}
#: Files of benchmarks.scaling: network and images, at 64 px.
SCALING = (("resnet18", 8), ("resnet18", 32), ("convnet", 32))
#: What two processes should gain: the aim.
GAIN = 1.6
#: From which share of a run on a step of the layerwise attack, a stage or a place is listed.
LISTED, LARGE = 0.02, 0.05
SETTING = ("network", "px", "B", "mode")
INTRODUCTION = """\
# Performance

How much time and memory does an attack take, compared with what, and where does it go? `python -m
benchmarks.performance_page` writes this page from the rows in `docs/rows/`, so please change the
rows or `benchmarks/performance_page.py`, not the page. What the attacks reach in images is in
[results.md](results.md).

Unless a table says otherwise it was measured on one core of a shared 2-core machine, in float32,
with one thread (`OMP_NUM_THREADS=1`), on photographs and random weights, without a GPU. Other
programs ran on that machine. Compared ways therefore take turns, and ratios are those of neighbours
in time. Figures are medians, with the lower and upper quartile in brackets. "Faster" and "slower"
stand only where both quartiles of a ratio lie on one side of 1.
"""


def peers(rows: Path) -> str:
    """Write about this project's loop and others'."""
    names = sorted(path.name for path in rows.glob("peers*.csv"))
    methods = [row for n in names for row in read(rows, n) if "ratio to breaching" in row]
    images = [row for n in names for row in read(rows, n) if "equal" in row]
    text = [
        "## Against other projects' loops",
        paragraph(
            "Is a step faster than those of the programs that one would use instead?",
            "`PYTHONPATH=FOLDER python -m benchmarks.peers --csv docs/rows/peers.csv` runs the",
            "same",
            "attack by breaching's own attacker, by the loops of Geiping et al. (2020) and of",
            "E2EGI written from their equations, and by this project's: the same network,",
            "gradient,",
            "labels, starts and settings, cosine distance with TV, signs into Adam. Before",
            "anything",
            "is timed, the derivatives are compared in float64.",
        ),
    ]
    if not methods:
        return "\n\n".join([*text, missing("peers.csv")])
    cells, sentences = [], []
    for row in methods:
        where = [row["network"], row["px"], row["B"], f"{row['mode']}, box {row['box']}"]
        if row["note"].startswith("left out"):
            cells.append([*where, row["method"], row["note"], *["–"] * 5])
            continue
        wall, cpu = (_three(row, column) for column in ("ratio", "cpu ratio"))
        cells.append([
            *where, row["method"], spread(*_three(row, "ms per step")), spread(*wall),
            spread(*cpu), f"{row['evaluations']} in {row['iterations']}",
            figure(_number(row, "peak resident MiB")), figure(_number(row, "peak allocated MiB")),
        ])  # fmt: skip
        if row["method"] == "exact" and row["ratio to breaching"]:
            reached = "within" if wall[0] <= AIM else "above"
            sentences.append(
                f"On {row['network']} ({row['px']} px, B {row['B']}, {row['mode']} mode) `exact` "
                f"takes {figure(wall[0], 2)} of breaching's step, {figure(cpu[0], 2)} by CPU time "
                f"({verdict(*wall)}; {reached} the aim of {AIM})."
            )
    text.append(
        table(
            ["network", "px", "B", "mode", "method", "ms per step", "of breaching's",
             "of its CPU time", "evaluations in iterations", "peak resident MiB",
             "peak in tensors MiB"],
            cells,
        )
    )  # fmt: skip
    notes = {(row["method"], row["note"]) for row in methods if row["note"]}
    kept = sorted(pair for pair in notes if not pair[1].startswith("left out"))
    told = [f"{method}: {note}." for method, note in kept]
    text.append(paragraph(*sentences, *told))
    if images:
        text += _peer_images(images)
    return "\n\n".join(part for part in text if part)


def _peer_images(images: Sequence[Row]) -> list[str]:
    """Return the table of images at equal iterations and at equal time, and what it says."""
    cells, sentences = [], []
    for key, own in groups(images, *SETTING, "box").items():
        at_time: dict[str, float] = {}
        for (method,), of in groups(own, "method").items():
            values = []
            for equal in ("iterations", "time"):
                some = [row for row in of if row["equal"] == equal]
                values += [
                    figure(median(numbers(some, "iterations"))),
                    _db(median(numbers(some, "psnr"))),
                    f"{median(numbers(some, 'distance')):.2e}",
                ]
                if equal == "time":
                    at_time[method] = median(numbers(some, "psnr"))
            cells.append([*key[:3], f"{key[3]}, box {key[4]}", method, *values])
        flat = median(numbers(own, "mean colour psnr"))
        cells.append(
            [*key[:3], f"{key[3]}, box {key[4]}", "mean colours", "", _db(flat), *[""] * 4]
        )
        best = max(at_time, key=lambda name: at_time[name])
        ours = at_time.get("exact")
        lead = ""
        if ours is not None and "breaching" in at_time:
            apart = ours - at_time["breaching"]
            lead = f"; `exact` is {abs(apart):.1f} dB {'above' if apart > 0 else 'below'} breaching"
        below = (
            "" if at_time[best] > flat else ", which is below the mean colours: no reconstruction"
        )
        sentences.append(
            f"At equal time {best} is highest on {key[0]} ({key[3]} mode, box {key[4]}) with "
            f"{_db(at_time[best])} dB{below}{lead}."
        )
    starts = len(groups(images, "start"))
    header = ["network", "px", "B", "mode", "method"]
    header += ["iterations", "PSNR dB at equal iterations", "distance"]
    header += ["iterations in breaching's time", "PSNR dB at equal time", "distance"]
    return [
        table(header, cells),
        paragraph(f"Images of {starts} start{'s' if starts > 1 else ''}, the last iterate.",
                  *sentences),
    ]  # fmt: skip


def pixel_gradient(rows: Path) -> str:
    """Write about exact against plain."""
    text = [
        "## Time of the pixel gradient",
        paragraph(
            "What is gained over the plain loop, which differentiates everything by double",
            "backward? `python -m benchmarks.pixel_gradient --arch ARCH --image-size PX",
            "--batch-size B --csv FILE` times `exact` and its slow twin `plain` in pairs, in train",
            "mode with TV and, where there is BatchNorm, its prior",
            "(`docs/rows/pixel_gradient_*.csv`).",
        ),
    ]
    cells, absent = [], []
    for network, (size, batch) in PIXEL_GRADIENTS.items():
        name = f"pixel_gradient_{network}.csv"
        found = read(rows, name)
        if not found:
            absent.append(missing(name))
            continue
        exact, plain = (numbers(found, f"{way}_seconds") for way in ("exact", "plain"))
        ratio = quartiles([a / b for a, b in zip(exact, plain, strict=True)])
        times = [spread(*quartiles([1e3 * s for s in way])) for way in (exact, plain)]
        cells.append([network, size, batch, len(found), *times, spread(*ratio), verdict(*ratio)])
    header = ["network", "px", "B", "pairs", "exact, ms", "plain, ms", "exact / plain", "exact is"]
    if cells:
        text.append(table(header, cells))
    text.append(
        paragraph(
            *absent,
            "`exact` builds no graph of the distance over all parameters, and no derivatives by",
            "the",
            "weights; and it takes convolutions, linear layers and BatchNorm in closed form",
            "(`inversion/closed_form/`).",
        )
    )
    return "\n\n".join(text)


def roofline(rows: Path) -> str:
    """Write about a step against the machine's peaks."""
    found, kinds = read(rows, "roofline.csv"), read(rows, "roofline_kinds.csv")
    text = [
        "## A step against the machine's limits",
        paragraph(
            "How much faster could a step be at best? `python -m benchmarks.roofline --csv",
            "docs/rows/roofline.csv` counts the floating-point operations of convolutions and",
            "matrix products and the bytes that all operations read and write, and measures in the",
            "same process what the machine does at best: products of matrices, and copies of",
            "memory",
            "well beyond the caches. The bound sums, over the operations, the larger of the",
            "times for",
            "arithmetic and for bytes. Caches serve a part of the bytes, so a step may beat it;",
            "the",
            "share of arithmetic alone is a limit in any case. The count by hand is that of seven",
            "products of a layer's own size in an exact step, nine in a plain one, fewer in the",
            "first",
            "layer.",
        ),
    ]
    if not found:
        return "\n\n".join([*text, missing("roofline.csv")])
    cells, sentences = [], []
    for key, by_setting in groups(found, *SETTING).items():
        times, shares = {}, {}
        for (method,), own in groups(by_setting, "method").items():
            times[method] = numbers(own, "ms")
            share = [
                [a / ms for a, ms in zip(numbers(own, column), times[method], strict=True)]
                for column in ("arithmetic ms", "bound ms")
            ]
            shares[method] = quartiles(share[1])
            cells.append([
                *key, method, spread(*quartiles(times[method])),
                *(figure(median(numbers(own, c))) for c in ("GFLOP", "GFLOP by hand", "MiB moved")),
                percent(median(share[0])), " – ".join(map(percent, sorted(shares[method])[::2])),
                percent(shares[method][0]),
            ])  # fmt: skip
        if {"exact", "plain"} <= set(times):
            ratio = quartiles([a / b for a, b in zip(times["exact"], times["plain"], strict=True)])
            sentences.append(
                f"On {key[0]} in {key[3]} mode `exact` takes {figure(ratio[0], 2)} of the plain "
                f"step ({verdict(*ratio)}) and reaches {percent(shares['exact'][0])} of its bound."
            )
    header = [*SETTING, "method", "ms", "GFLOP", "by hand", "MiB moved", "arithmetic's share",
              "bound's share, quartiles", "bound's share"]  # fmt: skip
    peaks = [spread(*quartiles(numbers(found, c)))
             for c in ("matrix product GFLOP/s", "copy GB/s")]  # fmt: skip
    text.append(table(header, cells))
    text.append(paragraph(f"The machine's peaks: {peaks[0]} GFLOP/s, {peaks[1]} GB/s.", *sentences))
    if not kinds:
        return "\n\n".join([*text, missing("roofline_kinds.csv")])
    order = list(dict.fromkeys(row["kind"] for row in kinds))
    shown = [
        [*key, *(percent(sum(numbers([r for r in own if r["kind"] == k], "share"))) for k in order)]
        for key, own in groups(kinds, *SETTING, "method").items()
    ]
    text.append(
        paragraph(
            "What fills a step, by the kind of operation, as torch's profiler sees it",
            "(`docs/rows/roofline_kinds.csv`). Its own cost is part of it: most of what lies",
            "between",
            "operations is Python, autograd and the profiler.",
        )
    )
    text.append(table([*SETTING, "method", *order], shown))
    return "\n\n".join(text)


def memory(rows: Path) -> str:
    """Write about chunks."""
    found = read(rows, "memory.csv")
    text = [
        "## Memory by the size of the batch",
        paragraph(
            "Does memory grow with the batch? `python -m benchmarks.memory --csv",
            "docs/rows/memory.csv` takes the exact derivative of a batch whole and in chunks",
            "(`--chunk-size`), in eval mode and in train mode with the client's statistics",
            "(forced).",
            "Tensors: the most that they hold at one time. The time is that of a step in chunks,",
            "relative to a whole one, in pairs.",
        ),
    ]
    if not found:
        return "\n\n".join([*text, missing("memory.csv")])
    flat = [row for row in found if row["part"] == "flat"]
    cells = [
        [row["network"], row["pixels"], row["mode"], row["batch"], row["chunk"] or "whole",
         figure(_number(row, "held MiB")), figure(_number(row, "counted MiB")), _ratio(row)]
        for row in flat
    ]  # fmt: skip
    header = ["network", "px", "mode", "B", "images at a time", "tensors, MiB", "counted, MiB"]
    text.append(table([*header, "time / whole"], cells))
    sentences = []
    for (mode, chunk), own in groups(flat, "mode", "chunk").items():
        held = numbers(own, "held MiB")
        batches = numbers(own, "batch")
        if len(held) > 1:
            growth = max(held) / min(held) - 1
            how = f"in chunks of {chunk}" if chunk else "whole"
            sentences.append(
                f"From B {batches[0]:.0f} to {batches[-1]:.0f}, {mode} mode, {how}: the most is "
                f"{growth:.1%} above the least."
            )
    text.append(paragraph(*sentences))
    timed = [row for row in found if row["part"] == "time"]
    text.append(
        paragraph(
            *(
                f"{row['network']} at {row['pixels']} px, {row['mode']} mode, B {row['batch']} in "
                f"chunks of {row['chunk']}: {_ratio(row)} of the time of a whole step."
                for row in timed
            )
        )
    )
    counts = [row for row in found if row["part"] == "count"]
    if counts:
        text.append(
            paragraph(
                "What is counted on shapes alone, beside what tensors hold and what a fresh",
                "process",
                "takes more; without the last two, real images would take too long:",
            )
        )
        columns = ("saved MiB", "counted MiB", "held MiB", "resident MiB")
        text.append(
            table(
                ["network", "px", "mode", "B", "images at a time", "saved by the graph, MiB",
                 "counted, MiB", "tensors, MiB", "resident, MiB"],
                [[r["network"], r["pixels"], r["mode"], r["batch"], r["chunk"] or "whole",
                  *(figure(_number(r, c)) for c in columns)] for r in counts],
            )
        )  # fmt: skip
    plans = []
    for row in (row for row in found if row["part"].startswith("plan")):
        _, device, limit = row["part"].split(" ", 2)
        plans.append(
            f"`--max-memory` of {limit} on a {device.upper()} picks {row['chunk'] or 'all'} images "
            f"at a time for {row['network']} at {row['pixels']} px, B {row['batch']}, "
            f"{row['mode']} mode, and expects {figure(_number(row, 'counted MiB'), 5)} MiB."
        )
    text.append(paragraph(*plans))
    return "\n\n".join(part for part in text if part)


def coupling(rows: Path) -> str:
    """Write about forced statistics."""
    found = read(rows, "bn_coupling_cost.csv")
    text = [
        "## Exact coupling against forced statistics",
        paragraph(
            "What do the client's statistics in place of the batch's own (`--bn-coupling forced`)",
            "cost? `python -m benchmarks.bn_coupling --only-cost --csv",
            "docs/rows/bn_coupling_cost.csv`: pairs of steps, and the bytes of tensors that they",
            "hold at most. What it does to images is in",
            "[results.md](results.md#exact-coupling-against-forced-statistics).",
        ),
    ]
    if not found:
        return "\n\n".join([*text, missing("bn_coupling_cost.csv")])
    cells = []
    for key, own in groups(found, "network", "px", "B").items():
        ratio = quartiles(numbers(own, "forced / exact"))
        kept = [median(numbers(own, f"{way} live bytes")) / 2**20 for way in ("exact", "forced")]
        cells.append([*key, len(own), spread(*ratio), verdict(*ratio), *map(figure, kept)])
    header = ["network", "px", "B", "pairs", "forced / exact", "forced is", "exact holds, MiB",
              "forced holds, MiB"]  # fmt: skip
    return "\n\n".join([*text, table(header, cells)])


def first_order(rows: Path) -> str:
    """Write about finite differences."""
    text = [
        "## Finite differences against exact",
        paragraph(
            "Does a step without second derivatives pay? `python -m benchmarks.first_order",
            "--only-time --csv FILE` times `--pixel-gradient finite-differences` and `exact` in",
            "pairs, 4 images at 32 px. What it does to images, which decides, is in",
            "[results.md](results.md#do-finite-differences-deserve-to-be-the-default).",
        ),
    ]
    files = {
        "first_order_time.csv": "before the layers of `exact` had closed forms",
        "first_order_time_closed.csv": "with closed forms",
    }
    cells, absent = [], []
    for name, when in files.items():
        found = read(rows, name)
        if not found:
            absent.append(missing(name))
        for (network,), own in groups(found, "network").items():
            ratio = quartiles(numbers(own, "ratio"))
            cells.append([network, when, len(own), spread(*ratio), verdict(*ratio)])
    if cells:
        header = ["network", "rows", "pairs", "finite differences / exact", "they are"]
        text.append(table(header, cells))
    return "\n\n".join([*text, *absent])


def layerwise(rows: Path) -> str:
    """Write about the layerwise attack."""
    steps, speed = read(rows, "layerwise_time.csv"), read(rows, "layerwise_speed.csv")
    text = [
        "## The layerwise attack",
        paragraph(
            "Where does its time go, and what has changed? `python -m benchmarks.layerwise_time",
            "--csv docs/rows/layerwise_time.csv --weights FILE` adds up CPU seconds by step, each",
            "without the steps inside it; `--before FOLDER --csv docs/rows/layerwise_speed.csv`",
            "runs",
            "an earlier version and this one in turn. [layerwise.md](layerwise.md) explains the",
            "steps",
            "and compares the results.",
        ),
    ]
    if steps:
        cells = []
        for (case,), own in groups(steps, "case").items():
            whole = sum(numbers([r for r in own if r["what"] == "whole"], "cpu_seconds"))
            shares = [
                (float(r["cpu_seconds"]) / whole, r["name"]) for r in own if r["what"] == "step"
            ]
            large = [f"{name} {percent(share)}" for share, name in sorted(shares)[::-1]
                     if share >= LARGE]  # fmt: skip
            cells.append([case, figure(whole), ", ".join(large)])
        text.append(table(["case", "CPU s", f"steps of at least {percent(LARGE)}"], cells))
    else:
        text.append(missing("layerwise_time.csv"))
    if speed:
        shown = []
        for (case,), own in groups(speed, "case").items():
            before, after = numbers(own, "before"), numbers(own, "after")
            ratio = quartiles([a / b for a, b in zip(after, before, strict=True)])
            both = [figure(median(values)) for values in (before, after)]
            shown.append([case, len(own), *both, spread(*ratio), verdict(*ratio)])
        header = ["case", "pairs of runs", "before, CPU s", "after", "after / before", "after is"]
        text.append(table(header, shown))
    else:
        text.append(missing("layerwise_speed.csv"))
    return "\n\n".join(text)


def whole_runs(rows: Path) -> str:
    """Write about the stages of whole runs."""
    found = read(rows, "shares.csv")
    text = [
        "## Where the time of a whole run goes",
        paragraph(
            "What else than the attack takes time? `python -m benchmarks.shares --csv",
            "docs/rows/shares.csv` looks every few milliseconds at what `run.py` does, from the",
            "start of Python to its end. `matching` is a small attack with labels from the",
            "gradient,",
            "scores, controls, decoys and pictures; `mlco` the same with four seeds; `search` a",
            "search alone, whose trials run in processes of their own.",
            f"Stages below {percent(LISTED)} are left out.",
        ),
    ]
    if not found:
        return "\n\n".join([*text, missing("shares.csv")])
    cells: list[list[str]] = []
    places: list[list[str]] = []
    for (case,), own in groups(found, "case").items():
        runs = [of for _, of in groups(own, "round").items()]
        whole = [[sum(numbers(of, c)) for of in runs] for c in ("seconds", "cpu seconds")]

        def shares(
            rows_: Sequence[Row], runs_: int = len(runs), totals: list = whole
        ) -> tuple[float, float]:
            by_round = groups(rows_, "round")
            both = []
            for column, sums in zip(("seconds", "cpu seconds"), totals, strict=True):
                parts = [sum(numbers(of, column)) for of in by_round.values()]
                parts += [0.0] * (runs_ - len(parts))
                both.append(median(parts) / median(sums))
            return both[0], both[1]

        stages = [(shares(of), key[0]) for key, of in groups(own, "stage").items()]
        cells.append([case, str(len(runs)), *(figure(median(sums)) for sums in whole), ""])
        cells[-1][-1] = ", ".join(
            f"{stage} {percent(share[0])} ({percent(share[1])})"
            for share, stage in sorted(stages)[::-1]
            if max(share) >= LISTED
        )
        for (stage, place), of in groups(own, "stage", "place").items():
            share = shares(of)
            if place and stage not in ATTACKS and max(share) >= LARGE:
                places.append([case, stage, f"`{place}`", *map(percent, share)])
    text.append(
        table(["case", "runs", "s", "CPU s", "stages: share of the time (of CPU time)"], cells)
    )
    if places:
        text.append(
            paragraph(
                "Outside the step and the controls, which are attacks too, these take at least "
                f"{percent(LARGE)}:"
            )
        )
        text.append(table(["case", "stage", "place", "share", "of CPU time"], places))
    else:
        text.append(
            paragraph(f"Outside the step and the controls nothing takes {percent(LARGE)} or more.")
        )
    return "\n\n".join(text)


def startup(rows: Path) -> str:
    """Write about the time to the first iteration."""
    found = read(rows, "startup.csv")
    text = [
        "## How soon do the scripts answer?",
        paragraph(
            "`python -m benchmarks.startup --rounds 3 --csv docs/rows/startup.csv`: every",
            "command in",
            "a process of its own, in turn; `lenet`, 2 photographs.",
        ),
    ]
    if not found:
        return "\n\n".join([*text, missing("startup.csv")])
    of = {name: numbers(own, "seconds") for (name,), own in groups(found, "command").items()}
    torch = of["import torch"]
    cells = [
        [f"`{name}`", spread(*quartiles(seconds)),
         spread(*quartiles([s / t for s, t in zip(seconds, torch, strict=True)]))]
        for name, seconds in of.items()
    ]  # fmt: skip
    text.append(table(["command", "seconds", "ratio to `import torch`"], cells))
    text.append(
        paragraph(
            "`--help` and refusals answer before torch is imported. The first iteration waits for",
            "torch: its optimisers import its compiler when the first one is made.",
        )
    )
    return "\n\n".join(text)


def processes(rows: Path) -> str:
    """Write about two processes."""
    text = [
        "## Two processes against one",
        paragraph(
            "Does a second process pay on two cores? `python -m benchmarks.scaling --arch ARCH",
            "--batch-size B --csv FILE` (`docs/rows/scaling_*.csv`): one step of `exact` at 64",
            "px in",
            "train mode with TV and BN prior, gloo, one thread per process, in pairs.",
        ),
    ]
    cells, absent, reached = [], [], []
    for network, batch in SCALING:
        name = f"scaling_{network}_b{batch}.csv"
        found = read(rows, name)
        if not found:
            absent.append(missing(name))
            continue
        one, half, two, sums = (
            numbers(found, column)
            for column in ("one process s", "one process, its part alone s", "2 processes s",
                           "in collectives s")
        )  # fmt: skip
        ratios = [
            quartiles([a / b for a, b in zip(x, y, strict=True)])
            for x, y in ((one, two), (one, half), (sums, two))
        ]
        said = verdict(*quartiles([b / a for a, b in zip(one, two, strict=True)]))
        if ratios[0][0] >= GAIN:
            reached.append(f"{network} with B {batch}")
        cells.append([network, batch, spread(*ratios[0]), said, figure(ratios[1][0]),
                      percent(ratios[2][0])])  # fmt: skip
    if cells:
        header = ["network", "B", "one / two processes", "two are", "whole batch / half alone",
                  "share of a step in sums over processes"]  # fmt: skip
        text.append(table(header, cells))
    text.append(
        paragraph(
            *absent,
            f"The aim of {GAIN} is reached by {' and '.join(reached) or 'none of them'}.",
            "What both processes do alike, all work on the weights, bounds the gain: the column",
            "before the last is what one process would gain by half the batch. The sum of the",
            "gradient and BatchNorm's sums come on top.",
        )
    )
    return "\n\n".join(text)


def gpu(rows: Path) -> str:
    """Write about steps on a GPU."""
    text = [
        "## On a GPU",
        paragraph(
            "What is gained on a GPU by graphs and number formats? `benchmarks/gpu.sh FOLDER`",
            "tests",
            "and measures all of it: peaks, steps of ResNet-50 at 224 px, small networks, images",
            "by",
            "number format, seeds side by side, the layerwise attack.",
        ),
    ]
    steps = [row for row in read(rows, "gpu_step.csv") if _on_gpu(row)]
    if not steps:
        text.append(missing("gpu_step.csv"))
    else:
        text.append(_gpu_steps(steps))
    loops = [row for row in read(rows, "gpu_loop.csv") if _on_gpu(row)]
    if loops:
        shown = [
            [*key, spread(*quartiles(numbers(own, "ms")))]
            for key, own in groups(loops, "device", "arch", "size", "batch", "kind").items()
        ]
        text.append(table(["device", "network", "px", "B", "loop", "ms per iteration"], shown))
    peaks = [row for row in read(rows, "gpu_peaks.csv") if _on_gpu(row)]
    if peaks:
        cells = [[r["device"], r["what"], figure(float(r["tera_per_s"]))] for r in peaks]
        text.append(table(["device", "peak", "10¹² per second"], cells))
    formats = read(rows, "gpu_precision.csv")
    if formats:
        cells = [
            [*key, _db(median(numbers(own, "psnr"))), f"{median(numbers(own, 'distance')):.2e}",
             figure(median(numbers(own, "seconds")))]
            for key, own in groups(formats, "device", "arch", "mode", "precision").items()
        ]  # fmt: skip
        header = ["device", "network", "mode", "format", "PSNR dB", "distance", "s"]
        text.append(table(header, cells))
    signs = read(rows, "gpu_signs.csv")
    if signs:
        text.append(
            paragraph(
                "Share of the derivative's entries with float32's sign, by number format, 4 images",
                "(`docs/rows/gpu_signs.csv`); the device says where this was measured:",
            )
        )
        cells = [
            [*key, spread(*quartiles([100 * v for v in numbers(own, "same_signs")]))]
            for key, own in groups(signs, "device", "arch", "mode", "precision", "where").items()
        ]
        text.append(table(["device", "network", "mode", "format", "at", "same signs, %"], cells))
    return "\n\n".join(text)


def _gpu_steps(steps: Sequence[Row]) -> str:
    cells, sentences = [], []
    for key, own in groups(steps, "device", "arch", "size", "batch", "mode").items():
        fastest: dict[str, float] = {}
        for (way,), of in groups(own, "way").items():
            ms = median(numbers(of, "median_ms"))
            if ms == ms:
                fastest[way] = ms
            note = next((row["note"] for row in of if row["note"]), "")
            low, high = (median(numbers(of, f"{q}_quartile_ms")) for q in ("lower", "upper"))
            cells.append([*key, way, note or spread(ms, low, high),
                          figure(median(numbers(of, "peak_mib"))),
                          percent(median(numbers(of, "share_of_matmul")))])  # fmt: skip
        if "plain" in fastest:
            best = min(fastest, key=lambda way: fastest[way])
            gain = fastest["plain"] / fastest[best]
            sentences.append(
                f"At B {key[3]}, {key[4]} mode, the fastest is {best}: {figure(gain, 2)} times as "
                "fast as plain."
            )
    header = ["device", "network", "px", "B", "mode", "way", "ms per iteration", "peak, MiB",
              "share of the peak of matrix products"]  # fmt: skip
    return table(header, cells) + "\n\n" + paragraph(*sentences)


def _on_gpu(row: Row) -> bool:
    return not row["device"].startswith("cpu")


def _number(row: Row, column: str) -> float:
    return float(row[column]) if row.get(column) else float("nan")


def _three(row: Row, name: str) -> tuple[float, float, float]:
    """Return median and quartiles of a quantity of the peers' rows."""
    if name == "ms per step":
        columns = (name, "lower quartile", "upper quartile")
    else:
        columns = (f"{name} to breaching", f"lower quartile of {name}", f"upper quartile of {name}")
    middle, low, high = (_number(row, column) for column in columns)
    return middle, low, high


def _ratio(row: Row) -> str:
    columns = ("time / whole", "first quartile", "third quartile")
    middle, low, high = (_number(row, column) for column in columns)
    return spread(middle, low, high)


def _db(value: float) -> str:
    return "–" if value != value else f"{value:.1f}"


SECTIONS: Sequence[Callable[[Path], str]] = (
    peers, pixel_gradient, roofline, memory, coupling, first_order, layerwise, whole_runs, startup,
    processes, gpu,
)  # fmt: skip


def page(rows: Path = DOCS / "rows") -> str:
    """Return the page's text; `rows` is the folder of the CSV files."""
    return "\n\n".join([INTRODUCTION.rstrip(), *(section(rows) for section in SECTIONS)]) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
