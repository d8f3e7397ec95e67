"""The tables and sentences that run.py prints about scores, labels and information."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inversion.audit.verdict import ALPHA, FEW_IMAGES, LEAKAGE_DIGITS, difference
from utils import metrics
from utils.console import table
from utils.matching import label_numbers
from utils.pictures import decibels

#: Classes that are printed, the most frequent ones first.
PRINTED_CLASSES = 40


def label_table(
    y: Tensor, lower_bounds: Tensor, *, certain: bool, y_true: Tensor | None = None
) -> str:
    """Return a table of reconstructed labels: class, count, lower bound, true count.

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


def score_table(scores: Mapping) -> str:
    """Return what is printed of scores: the table of images, the verdict, and what it rests on.

    scores: as `inversion.audit.scoring.score_images` returns them.
    """
    images, identification = scores["images"], scores["identification"]
    names = list(scores["mean"])
    rows = [
        [
            image["true"],
            image["reconstruction"],
            f"{_label(image['label_true'])} / {_label(image['label'])}",
            *("exact" if name == "psnr" and image["exact"] else image[name] for name in names),
            "yes" if image["above_baselines"] else f"no: flat {decibels(image['flat_psnr'])}",
        ]
        for image in images
    ]
    header = ["image", "paired with", "label true / used", "MSE", "PSNR dB", "SSIM", "LPIPS"]
    header.append("reconstruction?")
    empty = [""]
    if identification is not None:
        header.append("rank among decoys")
        empty.append("")
        for row, rank in zip(rows, identification["ranks"], strict=True):
            row.append(f"{rank} of {identification['candidates']}")
    summaries = {"mean": scores["mean"], "std": scores["std"]}
    summaries |= {f"{name} image": values for name, values in scores["baselines"].items()}
    summaries |= {f"control: {n}": of["mean"] for n, of in (scores["controls"] or {}).items()}
    for title, values in summaries.items():
        shown = (math.nan if values[name] is None else values[name] for name in names)
        rows.append([title, "", "", *shown, *empty])
    return "\n".join(
        [
            table(header, rows, separated=len(summaries)),
            f"{_label_accuracy(images)}; paired by {scores['pairing']}; {_against_flat(images)}",
            scores["verdict"]["sentence"],
            *_details(scores),
        ]
    )


def _label(label: int | Sequence[float]) -> str:
    """Write a class, or a label vector: as digits where it holds 0 and 1 alone."""
    if isinstance(label, int):
        return str(label)
    digits = set(label) <= {0, 1}
    return "".join(str(int(v)) for v in label) if digits else " ".join(f"{v:g}" for v in label)


def _label_accuracy(images: Sequence[Mapping]) -> str:
    used, true = (torch.tensor([i[key] for i in images]) for key in ("label", "label_true"))
    return f"label accuracy {100 * metrics.label_accuracy(*label_numbers(used, true)):.1f} %"


def _against_flat(images: Sequence[Mapping]) -> str:
    below = sum(not image["above_baselines"] for image in images)
    if not below:
        return "every image scores above a grey image and above its own mean colour"
    return (
        f"{below} of {len(images)} images score no better in PSNR than a flat image: by that "
        "measure those are no reconstructions (for dark images see SSIM and the pictures)"
    )


def _details(scores: Mapping) -> list[str]:
    """Return the lines below the verdict: what it rests on, and what weakens it."""
    lines = [*_rank_lines(scores), *_paired_lines(scores), *_control_lines(scores)]
    if scores["exact_images"]:
        lines.append(
            f"{scores['exact_images']} of {len(scores['images'])} images are exact: in the mean "
            f"their PSNR, which is infinite, counts as {metrics.PSNR_CEILING:g} dB"
        )
    return lines


def _rank_lines(scores: Mapping) -> list[str]:
    identification, verdict, lines = scores["identification"], scores["verdict"], []
    if identification is not None:
        found = ", ".join(map(str, verdict["identified"])) or "none"
        lines.append(
            f"ranks among {identification['candidates'] - 1} decoys per image, by "
            f"{verdict['metric'].upper()}: p = {identification['p']:.2g} (all images together "
            f"{identification['batch_p']:.2g}); identified one by one, corrected for their "
            f"number: {found}"
        )
        for name, control in (scores["controls"] or {}).items():
            if control["identification_p"] <= ALPHA:
                lines.append(
                    f"caution: the ranks of control {name}, which knows nothing of the client's "
                    f"gradient, have p = {control['identification_p']:.2g}: these decoys may be "
                    "unlike the true images in kind"
                )
    return lines


def _paired_lines(scores: Mapping) -> list[str]:
    paired, metric = scores["paired"], scores["verdict"]["metric"]
    if paired is None:
        return []
    decoys, signs = (
        "" if paired[key] is None else f"; p = {paired[key]:.2g} by {what}"
        for key, what in (("p", "the decoys"), ("signs_p", "signs, which decides nothing"))
    )
    return [
        f"against the gradient of other images, image by image: {metric.upper()} "
        f"{paired['mean']:+.{LEAKAGE_DIGITS[metric]}f}{decoys}{signs}"
    ]


def _control_lines(scores: Mapping) -> list[str]:
    metric = scores["verdict"]["metric"]
    if scores["leakage"] is None:
        return []
    above = scores["leakage"][metric]["images"]
    lines = [
        "against each image's best control: "
        + ", ".join(difference(name, of) for name, of in scores["leakage"].items())
        + f"; {sum(value > 0 for value in above)} of {len(above)} images stand above every control "
        f"in {metric.upper()}",
        "against one control alone: "
        + "; ".join(
            f"{name} {difference(metric, control['leakage'][metric])}"
            for name, control in scores["controls"].items()
        ),
    ]
    if 1 < len(above) < FEW_IMAGES:
        lines.append(
            f"fewer than {FEW_IMAGES} images: the intervals are too narrow, a hint at most; the "
            "p values hold"
        )
    return lines


def information_table(
    columns: Mapping[str, Sequence], batch_norm: float, *, independent: bool, protected: bool
) -> str:
    """Return the table of the gradient information ratio.

    columns: field of `inversion.audit.information.Information` → (B,) values, "label" before them.
    protected: whether what the client sent was changed before.
    """
    titles = {
        "label": "label", "confidence": "confidence", "predicted": "predicted",
        "predicted_confidence": "its confidence", "norm": "norm", "squared_l2": "squared L2",
        "cosine_distance": "cosine distance", "sign_rate": "equal signs %",
        "information": "information", "ratio": "ratio %",
    }  # fmt: skip
    shown = {**columns, "label": [_label(label) for label in columns["label"]]}
    rows = [[i, *values] for i, values in enumerate(zip(*shown.values(), strict=True))]
    total = {"norm": batch_norm, "information": sum(columns["information"])}
    rows.append(["batch", *(total.get(name, "") for name in columns)])
    rows[-1][-1] = sum(columns["ratio"])
    header = ["image", *(titles[name] for name in columns)]
    kind = (
        "every image's own gradient"
        if independent
        else "BatchNorm mixes the images: each one's share inside the batch's statistics"
    )
    before = ", before protection" if protected else ""
    return (
        f"gradient information ratio ({kind}{before}; distances and signs against the batch's "
        f"gradient; ratio: share of the information after a shift by the smallest, if negative; no "
        f"measure of risk)\n{table(header, rows, separated=1)}"
    )
