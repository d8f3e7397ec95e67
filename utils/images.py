"""Pictures: from normalised tensors to files that a person looks at."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first)

PAIRS_A_ROW = 8


def denormalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images (B, C, H, W) → [0, 1], clamped, on the CPU. mean, std: (C, 1, 1)."""
    x = x.detach().cpu()
    return (x * std.to(x) + mean.to(x)).clamp(0, 1)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one image (C, H, W) in [0, 1], C 1 or 3, as an 8-bit PNG."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


def save_images(images: Tensor, folder: str | Path, name: str) -> None:
    """Write images (B, C, H, W) in [0, 1] as `{folder}/{name}_{index}.png`; makes the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_png(image, Path(folder) / f"{name}_{i:03d}.png")


def save_panels(
    rows: Sequence[tuple[str, Tensor]], path: str | Path, captions: Sequence[str] | None = None
) -> None:
    """Write one picture of several rows of images, image i of every row above one another.

    rows: (title, images (B, C, H, W) in [0, 1]). captions: B texts under the last row. Batches
    of more than eight go on in further groups of rows below.
    """
    count = len(rows[0][1])
    columns = min(count, PAIRS_A_ROW)
    groups = -(-count // columns)
    figure, axes = pyplot.subplots(
        groups * len(rows),
        columns,
        figsize=(1.5 * columns + 0.5, groups * (1.5 * len(rows) + 0.3)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for r, (title, images) in enumerate(rows):
        for i, image in enumerate(images):
            axis = axes[i // columns * len(rows) + r, i % columns]
            axis.imshow(_for_imshow(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if i % columns == 0:
                axis.set_ylabel(title, fontsize=9)
            if captions is not None and r == len(rows) - 1:
                axis.set_xlabel(captions[i], fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _for_imshow(image: Tensor):
    image = image.permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[-1] == 1 else image


def save_curves(curves: dict[str, dict[str, tuple[list, list]]], path: str | Path) -> None:
    """Write loss curves: panel title → line label → (iterations, values), log scale if > 0."""
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(4 * len(curves), 3), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], curves.items(), strict=True):
        for label, (steps, values) in lines.items():
            axis.plot(steps, values, linewidth=1, label=label)
        if all(v > 0 for _, values in lines.values() for v in values):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
