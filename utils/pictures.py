"""Draws pictures of images, losses and trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from utils.files import whole_file
from utils.images import eight_bit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How many images stand side by side.
IMAGES_PER_ROW = 8


def _pyplot():
    """Return matplotlib's pyplot, which draws into files alone; importing it takes a second."""
    import matplotlib  # not above: many runs draw nothing

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one image (C, H, W) in [0, 1], C 1 or 3, as an 8-bit PNG."""
    pixels = eight_bit(image.permute(1, 2, 0)).numpy()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    with whole_file(path) as file:
        picture.save(file, format="png")


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write a figure as a PNG and close it."""
    try:
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=100)
    finally:
        _pyplot().close(figure)


def save_images(images: Tensor, folder: str | Path, name: str) -> None:
    """Write images (B, C, H, W) in [0, 1] as `{folder}/{name}_{index}.png`, index 000, 001, …"""
    for i, image in enumerate(images):
        save_png(image, Path(folder) / f"{name}_{i:03d}.png")


def save_panels(
    rows: Sequence[tuple[str, Tensor]],
    path: str | Path,
    captions: Sequence[str] | None = None,
    marked: int | None = None,
    per_row: int = IMAGES_PER_ROW,
) -> None:
    """Write one picture of several rows of images; image i of every row is in the same column.

    rows: pairs of a title and images (B, C, H, W) in [0, 1]. captions: B texts, below the last row.
    marked: index of the column that gets a red frame. More images than `per_row` continue in a
    further group of rows below.
    """
    pyplot = _pyplot()
    count = len(rows[0][1])
    columns = min(count, per_row)
    groups = -(-count // columns)
    height, width = rows[0][1].shape[-2:]
    gap = max(1, round(0.06 * width))
    text = 0 if captions is None else max(1, round(0.22 * height))
    step_y, step_x = len(rows) * (height + gap) + text, width + gap
    canvas = torch.ones(groups * step_y, columns * step_x, 3)

    def corner(i: int, r: int) -> tuple[int, int]:
        return i // columns * step_y + r * (height + gap), i % columns * step_x

    for r, (_, images) in enumerate(rows):
        for i, image in enumerate(images):
            top, left = corner(i, r)
            canvas[top : top + height, left : left + width] = image.permute(1, 2, 0)
    inches = 1.5 / step_x  # an image and its gap are an inch and a half wide
    figure = pyplot.figure(figsize=(inches * canvas.shape[1] + 0.4, inches * canvas.shape[0]))
    share = 0.4 / figure.get_figwidth()
    axis = figure.add_axes((share, 0, 1 - share, 1))
    axis.imshow(canvas.numpy(), interpolation="nearest")
    axis.set_axis_off()
    for group in range(groups):
        for r, (title, _) in enumerate(rows):
            top, _ = corner(group * columns, r)
            axis.text(-gap, top + height / 2, title, rotation=90, ha="right", va="center", size=9)
    for i, caption in enumerate(captions or ()):
        top, left = corner(i, len(rows) - 1)
        axis.text(left + width / 2, top + height + gap, caption, ha="center", va="top", size=9)
    if marked is not None:
        top, left = corner(marked, 0)
        size = (width - 1, len(rows) * (height + gap) - gap - 1)
        axis.add_patch(pyplot.Rectangle((left, top), *size, fill=False, ec="red", lw=2))
    save_figure(figure, path)


def decibels(psnr: float | None) -> str:
    """Write a PSNR in dB, or "exact" for None, the PSNR of an exact image in result.json."""
    return "exact" if psnr is None else f"{psnr:.1f} dB"


def save_pairs(found: Tensor, true: Tensor | None, scores: dict | None, folder: Path) -> None:
    """Write `pairs.png` and `images/`: the reconstructions and, if `scores` is given, the truth.

    found, true: (B, C, H, W) in [0, 1]. scores: the metrics of result.json, which contain the
    pairing. With scores the images are in the order of `true`, without them in that of `found`.
    """
    if scores is None or true is None:
        save_panels([("reconstruction", found)], folder / "pairs.png")
        save_images(found, folder / "images", "reconstruction")
        return
    paired = found[[image["reconstruction"] for image in scores["images"]]]
    captions = [decibels(image["psnr"]) for image in scores["images"]]
    save_panels([("truth", true), ("reconstruction", paired)], folder / "pairs.png", captions)
    save_images(true, folder / "images", "truth")
    save_images(paired, folder / "images", "reconstruction")


def save_controls(
    found: Tensor, true: Tensor, controls: Mapping[str, Tensor], scores: dict, path: str | Path
) -> None:
    """Write the truth, the reconstruction and the images of every control, one above the other.

    found, true and the controls: (B, C, H, W) in [0, 1]. scores: the metrics of result.json, which
    contain the pairing. Each column is captioned with its number and PSNR; the verdict's worst
    image is framed.
    """
    paired = found[[image["reconstruction"] for image in scores["images"]]]
    rows = [("truth", true), ("attack", paired)]
    for name, images in controls.items():
        rows.append((name, images[scores["controls"][name]["reconstruction"]]))
    worst = scores["verdict"]["worst_image"]
    captions = [
        f"{image['true']}: {decibels(image['psnr'])}{' (worst)' if image['true'] == worst else ''}"
        for image in scores["images"]
    ]
    save_panels(rows, path, captions, marked=worst)


def save_layers(
    found: Tensor,
    true: Tensor | None,
    decoded: Mapping[str, Tensor],
    scores: dict | None,
    path: str | Path,
) -> None:
    """Write the images decoded from every recovered tensor, from the head down, then the result.

    found: (B, C, H, W) in [0, 1], as is each of `decoded`, by the tensor's name; true: the truth,
    if it is scored, whose pairing `scores` contains. One row per image, eight images at most.
    """
    order = list(range(len(found)))
    if scores is not None:
        order = [image["reconstruction"] for image in scores["images"]]
    columns = [(name, images[order]) for name, images in decoded.items()]
    columns.append(("result", found[order]))
    if true is not None and scores is not None:
        columns.append(("truth", true))
    names = [name.replace("_", "\n", 1) for name, _ in columns]
    rows = [
        (f"image {i}", torch.stack([images[i] for _, images in columns]))
        for i in range(min(len(found), IMAGES_PER_ROW))
    ]
    save_panels(rows, path, names, per_row=len(columns))


def save_decoys(
    found: Tensor, true: Tensor, decoys: Tensor, scores: dict, path: str | Path
) -> None:
    """Write the worst image's reconstruction, its truth, and the decoys most similar to it.

    found, true: (B, C, H, W) in [0, 1]. decoys: (B, N, C, H, W) of uint8, N per image. scores: the
    metrics of result.json, which contain the pairing and the ranks.
    """
    worst, ranks = scores["verdict"]["worst_image"], scores["identification"]
    source = scores["images"][worst]["reconstruction"]
    nearest = ranks["nearest"][worst]
    row = torch.cat([found[source][None], true[worst][None], decoys[worst, nearest] / 255])
    captions = ["reconstruction", f"truth, rank {ranks['ranks'][worst]}\nof {ranks['candidates']}"]
    captions += [f"decoy\n{place + 1}" for place in range(len(nearest))]
    save_panels([(f"image {worst}", row)], path, captions, marked=1)


def save_choices(rounds: Sequence[dict], path: str | Path) -> None:
    """Write a picture of rounds × images whose colours show which seed each image came from.

    rounds: dicts with `iteration` and `seeds`, one seed per image.
    """
    pyplot = _pyplot()
    seeds = sorted({seed for found in rounds for seed in found["seeds"]})
    colours = pyplot.get_cmap("tab20" if len(seeds) > 10 else "tab10", max(len(seeds), 10))
    places = [[seeds.index(seed) for seed in found["seeds"]] for found in rounds]
    width, height = max(4.0, 0.25 * len(places[0]) + 2), 0.3 * len(rounds) + 1.2
    figure, axis = pyplot.subplots(figsize=(min(width, 30), height), layout="constrained")
    axis.imshow(places, cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, aspect="auto")
    axis.set(xlabel="image", ylabel="after iteration")
    axis.set_yticks(range(len(rounds)), [found["iteration"] for found in rounds])
    axis.xaxis.get_major_locator().set_params(integer=True)
    patches = [
        pyplot.Rectangle((0, 0), 1, 1, color=colours(place), label=f"seed {seed}")
        for place, seed in enumerate(seeds)
    ]
    axis.legend(handles=patches, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def save_trials(trials: Sequence[dict], names: Sequence[str], path: str | Path) -> None:
    """Plot the error against every searched parameter, one dot per trial, coloured by iterations.

    trials: dicts with `mse`, `iterations` and one value per name. Trials whose `mse` is None are
    left out.
    """
    pyplot = _pyplot()
    scored = [trial for trial in trials if trial["mse"] is not None]
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(3.5 * len(names) + 1, 3), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        values = [trial[name] for trial in scored]
        dots = axis.scatter(
            values, [t["mse"] for t in scored], c=[t["iterations"] for t in scored], s=18
        )
        axis.set(xlabel=name, ylabel="mean squared error", yscale="log")
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    figure.colorbar(dots, ax=axes[0, -1], label="iterations")
    save_figure(figure, path)


def save_losses(
    header: Sequence[str], rows: Sequence[Sequence], rounds: Sequence[dict], path: str | Path
) -> None:
    """Plot the loss curves: one panel per column from "total" onwards, one line per seed.

    A panel is logarithmic if all its values are positive.

    header, rows: those of losses.csv, whose first two columns are seed and iteration; empty cells
    are left out. rounds: dicts with `iteration` and `gradient_loss`, one dot per round in the panel
    "gradient".
    """
    pyplot = _pyplot()
    curves: dict[str, dict[str, tuple[list, list]]] = {}
    for column in range(header.index("total"), len(header)):
        lines = curves[header[column]] = {}
        for row in rows:
            if row[column] != "":
                label = row[0] if isinstance(row[0], str) else f"seed {row[0]}"
                steps, values = lines.setdefault(label, ([], []))
                steps.append(row[1])
                values.append(row[column])
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], curves.items(), strict=True):
        for label, (steps, values) in lines.items():
            axis.plot(steps, values, linewidth=1, label=label)
        if rounds and title == "gradient":
            steps = [found["iteration"] for found in rounds]
            values = [found["gradient_loss"] for found in rounds]
            axis.plot(steps, values, "ko", markersize=4, label="consensus formed")
        if all(v > 0 for _, values in lines.values() for v in values):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    save_figure(figure, path)
