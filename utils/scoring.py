"""Scoring a reconstruction against the truth: pairing, scores, what a flat image would score."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from utils import metrics
from utils.report import table

#: Classes that are printed, the most frequent ones first.
PRINTED_CLASSES = 40


def label_table(
    y: Tensor, lower_bounds: Tensor, *, certain: bool, y_true: Tensor | None = None
) -> str:
    """A table of reconstructed labels to print: class, count, lower bound, true count.

    y: (B,) labels. lower_bounds: (C,) least number of every class. y_true: for scoring.
    """
    num_classes = len(lower_bounds)
    n = torch.bincount(y.cpu(), minlength=num_classes)
    true = None if y_true is None else torch.bincount(y_true.cpu(), minlength=num_classes)
    involved = (n > 0) | (lower_bounds > 0)
    if true is not None:
        involved |= true > 0
    classes = involved.nonzero().flatten()
    order = n[classes].argsort(descending=True, stable=True)
    classes = classes[order].tolist()
    header = ["class", "labels", "at least" if certain else "likely at least"]
    columns = [n, lower_bounds]
    if true is not None:
        header.append("true")
        columns.append(true)
    rows = [[k, *(int(column[k]) for column in columns)] for k in classes[:PRINTED_CLASSES]]
    lines = [table(header, rows)]
    if len(classes) > PRINTED_CLASSES:
        lines.append(f"and {len(classes) - PRINTED_CLASSES} more classes, in result.json")
    kind = "certain" if certain else "likely"
    lines.append(
        f"{int(torch.minimum(lower_bounds, n).sum())} of {len(y)} labels are {kind} from the "
        "gradient alone"
    )
    if true is not None:
        distinct = int((true > 0).sum())
        lines.append(
            f"label accuracy {100 * metrics.label_accuracy(y, y_true):.1f} % (overlap of the two "
            f"label multisets); classes: {int(((n > 0) & (true > 0)).sum())} of {distinct} found, "
            f"{int(((n > 0) & (true == 0)).sum())} wrong, existence accuracy "
            f"{100 * metrics.existence_accuracy(y, y_true, num_classes):.1f} % of {num_classes}"
        )
        shared = int(true[true > 1].sum())
        lines.append(
            f"repetition rate: {100 * (1 - distinct / len(y)):.1f} % as 1 − distinct / B, "
            f"{100 * shared / len(y):.1f} % as the share of images whose label another one has"
        )
    return "\n".join(lines)


def score_reconstruction(
    found: Tensor,
    true: Tensor,
    y_found: Tensor,
    y_true: Tensor,
    *,
    by_index: bool,
    lpips_score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dict, str]:
    """Score images `found` against `true`, both (B, C, H, W) in [0, 1].

    Pairs by the best one-to-one assignment, or `by_index`. Beside the scores stand those of
    images that need no attack (`metrics.baselines`): an image whose PSNR is not above the
    better of them is no reconstruction.

    Returns the `metrics` entry of result.json and a table to print.
    """
    order = list(range(len(true))) if by_index else metrics.assign(found, true)
    used = {**metrics.METRICS, **({"lpips": lpips_score} if lpips_score else {})}
    names = [*metrics.METRICS, "lpips"]
    scores = metrics.score(found[order], true, used)
    references = {
        name: metrics.score(images, true, used) for name, images in metrics.baselines(true).items()
    }

    images = []
    for i, source in enumerate(order):
        values = {name: scores.images[name][i] if name in used else math.nan for name in names}
        floor = max(reference.images["psnr"][i] for reference in references.values())
        images.append(
            {
                "true": i,
                "reconstruction": source,
                "label_true": int(y_true[i]),
                "label": int(y_found[source]),
                **values,
                "above_baselines": values["psnr"] > floor,
            }
        )
    pairing = "index" if by_index else "assignment"
    result = {
        "pairing": pairing,
        "mean": {name: scores.mean.get(name) for name in names},
        "std": {name: scores.std.get(name) for name in names},
        "images": images,
        "baselines": {
            label: {name: reference.mean.get(name) for name in names}
            for label, reference in references.items()
        },
    }

    rows = [
        [
            image["true"],
            image["reconstruction"],
            f"{image['label_true']} / {image['label']}",
            *(image[name] for name in names),
            "yes" if image["above_baselines"] else "no: a flat image scores as well",
        ]
        for image in images
    ]
    summaries = {"mean": scores.mean, "std": scores.std}
    summaries |= {f"{label} image": reference.mean for label, reference in references.items()}
    rows += [
        [title, "", "", *(values.get(name, math.nan) for name in names), ""]
        for title, values in summaries.items()
    ]
    header = ["image", "paired with", "label true / used", "MSE", "PSNR dB", "SSIM", "LPIPS"]
    below = sum(not image["above_baselines"] for image in images)
    verdict = (
        f"{below} of {len(true)} images score no better in PSNR than a flat image: those are no "
        "reconstructions"
        if below
        else "every image scores above a grey image and above its own mean colour"
    )
    text = (
        f"{table([*header, 'reconstruction?'], rows, separated=len(summaries))}\n"
        f"label accuracy {100 * metrics.label_accuracy(y_found, y_true):.1f} %; paired by "
        f"{pairing}; {verdict}"
    )
    return result, text
