"""Scoring a reconstruction against the truth: pairing, scores, what images score that need no
attack or no gradient, and what of the reconstruction is therefore leakage."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from inversion.audit.identification import (
    Identification,
    identify,
    nearest_decoys,
    paired_difference,
    similarities,
)
from inversion.audit.verdict import (
    ALPHA,
    FEW_IMAGES,
    LEAKAGE_DIGITS,
    Verdict,
    difference,
    judge,
)
from utils import metrics
from utils.console import table
from utils.matching import assign
from utils.pictures import decibels

#: A control whose p is at most this many times the attack's tells true images from decoys nearly as
#: well, without knowing anything of them: the decoys are then unlike them.
NEARLY_AS_CLEAR = 10
#: Decoys that are recorded for the picture of an image.
SHOWN_DECOYS = 6
#: The control that has the client's settings and other images.
OTHER_GRADIENT = "other gradient"
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
    ssim: Callable[[Tensor, Tensor], Tensor] = metrics.ssim,
    lpips_score: Callable[[Tensor, Tensor], Tensor] | None = None,
    controls: Mapping[str, Tensor] | None = None,
    decoys: Tensor | None = None,
    verdict_metric: str = "ssim",
    missing: Sequence[str] = (),
    doubt: str | None = None,
    arrived: bool = True,
) -> tuple[dict, str]:
    """Score images `found` against `true`, both (B, C, H, W) in [0, 1], and judge them.

    Pairs by the best one-to-one assignment within the labels, or `by_index`. Beside the scores
    stand those of images that need no attack (`metrics.baselines`): an image whose PSNR is not
    above the better of them is no reconstruction. ssim: a function of `metrics.SSIMS`.

    y_found, y_true: (B,) labels that the attack went by, and the true ones. controls: name →
    (B, C, H, W) in [0, 1], what comes out without the client's gradient, paired by the same rule;
    `leakage` sets the scores against them. decoys: (B, N − 1, C, H, W) of uint8, images that
    could have been in the place of each true one (`identification.identify`). verdict_metric: the
    metric that decides. missing, doubt, arrived: as in `verdict.judge`.

    Returns the `metrics` entry of result.json and a table to print. In the entry the PSNR of an
    exact image is None and `exact` true; metrics that do not apply are None or NaN.
    """

    def pairing_of(images):
        return list(range(len(true))) if by_index else assign(images, true, y_found, y_true)

    order = pairing_of(found)
    used = {**metrics.METRICS, "ssim": ssim, **({"lpips": lpips_score} if lpips_score else {})}
    names = [*metrics.METRICS, "lpips"]
    scores = metrics.score(found[order], true, used)
    orders = {name: pairing_of(images) for name, images in (controls or {}).items()}
    control_scores = {
        name: metrics.score(controls[name][orders[name]], true, used) for name in orders
    }
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
                "psnr": _written_psnr(values["psnr"]),
                "exact": values["mse"] == 0,
                "above_baselines": values["psnr"] > floor,
                "flat_psnr": _written_psnr(floor),
            }
        )
    pairing = "index" if by_index else "assignment"
    result = {
        "pairing": pairing,
        "mean": {name: scores.mean.get(name) for name in names},
        "std": {name: scores.std.get(name) for name in names},
        "exact_images": _exact_images(scores),
        "images": images,
        "baselines": {
            label: {name: reference.mean.get(name) for name in names}
            for label, reference in references.items()
        },
        "controls": None,
        "leakage": None,
        "identification": None,
        "paired": None,
    }
    if controls:
        result["controls"] = {
            label: {
                "mean": {name: control.mean.get(name) for name in names},
                "exact_images": _exact_images(control),
                "images": control.images | {"psnr": [*map(_written_psnr, control.images["psnr"])]},
                "reconstruction": orders[label],
                "leakage": leakage(scores.images, [control.images]),
            }
            for label, control in control_scores.items()
        }
        result["leakage"] = leakage(scores.images, [c.images for c in control_scores.values()])
    metric = _deciding_metric(verdict_metric, scores)
    identification, paired, unlike = None, None, []
    if decoys is not None:
        likeness = _likeness(metric, used[metric])

        def similar(images):
            return similarities(
                likeness, images, y_found, _eight_bits(true), y_true, decoys, by_index=by_index
            )

        matrix = similar(found)
        identification = identify(matrix)
        result["identification"] = asdict(identification) | {
            "metric": metric,
            "nearest": [nearest_decoys(row, SHOWN_DECOYS) for row in matrix],
        }
        for name, images_of in (controls or {}).items():
            theirs = similar(images_of)
            p = result["controls"][name]["identification_p"] = identify(theirs).p
            if p <= min(ALPHA, NEARLY_AS_CLEAR * identification.p):
                unlike.append(f"control {name}")
            if name == OTHER_GRADIENT:
                paired = paired_difference(matrix, theirs)
    elif OTHER_GRADIENT in control_scores:
        mine, theirs = (_better_is_higher(metric, of.images)[:, None]
                        for of in (scores, control_scores[OTHER_GRADIENT]))  # fmt: skip
        paired = paired_difference(mine, theirs)
    result["paired"] = paired and asdict(paired)
    verdict = judge(
        result["leakage"], identification, paired, metric=metric, unlike=unlike, missing=missing,
        doubt=doubt, arrived=arrived,
    )  # fmt: skip
    result["verdict"] = asdict(verdict)

    rows = [
        [
            image["true"],
            image["reconstruction"],
            f"{image['label_true']} / {image['label']}",
            *("exact" if name == "psnr" and image["exact"] else image[name] for name in names),
            "yes" if image["above_baselines"] else f"no: flat {decibels(image['flat_psnr'])}",
        ]
        for image in images
    ]
    if identification is not None:
        for row, rank in zip(rows, identification.ranks, strict=True):
            row.append(f"{rank} of {identification.candidates}")
    summaries = {"mean": scores.mean, "std": scores.std}
    summaries |= {f"{label} image": reference.mean for label, reference in references.items()}
    summaries |= {f"control: {label}": control.mean for label, control in control_scores.items()}
    empty = [""] * (1 if identification is None else 2)
    rows += [
        [title, "", "", *(values.get(name, math.nan) for name in names), *empty]
        for title, values in summaries.items()
    ]
    header = ["image", "paired with", "label true / used", "MSE", "PSNR dB", "SSIM", "LPIPS"]
    header += ["reconstruction?"] + ([] if identification is None else ["rank among decoys"])
    below = sum(not image["above_baselines"] for image in images)
    flat = (
        f"{below} of {len(true)} images score no better in PSNR than a flat image: by that measure "
        "those are no reconstructions (for dark images see SSIM and the pictures)"
        if below
        else "every image scores above a grey image and above its own mean colour"
    )
    text = (
        f"{table(header, rows, separated=len(summaries))}\n"
        f"label accuracy {100 * metrics.label_accuracy(y_found, y_true):.1f} %; paired by "
        f"{pairing}; {flat}\n{verdict.sentence}"
    )
    details = _details(verdict, result, identification)
    if result["exact_images"]:
        details.append(
            f"{result['exact_images']} of {len(true)} images are exact: in the mean their PSNR, "
            f"which is infinite, counts as {metrics.PSNR_CEILING:g} dB"
        )
    return result, "\n".join([text, *details])


def _deciding_metric(wanted: str, scores: metrics.Scores) -> str:
    """`wanted`, or PSNR where it has no value, as SSIM of images smaller than its window."""
    values = scores.images.get(wanted, [math.nan])
    return "psnr" if np.isnan(values).any() else wanted


def _better_is_higher(metric: str, values: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Values (B,) of a metric such that higher is better and no PSNR is infinite."""
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    return np.minimum(sign * np.array(values[metric]), metrics.PSNR_CEILING)


def _likeness(metric: str, score: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    return lambda x, y: (sign * score(x, y)).clamp(max=metrics.PSNR_CEILING)


def _eight_bits(images: Tensor) -> Tensor:
    """Images in [0, 1] rounded as decoys are stored, so that rounding tells none from another."""
    return (images * 255).round() / 255


def _written_psnr(value: float) -> float | None:
    return None if math.isinf(value) else value


def _exact_images(scores: metrics.Scores) -> int:
    return scores.images["mse"].count(0)


def leakage(
    scores: Mapping[str, Sequence[float]], controls: Sequence[Mapping[str, Sequence[float]]]
) -> dict:
    """How far the images stand above the best of the controls, each image's own.

    scores, controls: metric → (B,) values. Returns metric → its mean, the bootstrap interval
    over images ("low", "high"; metrics.bootstrap_interval) and the (B,) differences, above 0
    where the attack is better. Metrics without a value are left out; PSNR counts up to 100 dB.
    """
    found = {}
    for name in LEAKAGE_DIGITS:
        if name not in scores or np.isnan(scores[name]).any():
            continue
        values = [_better_is_higher(name, of) for of in (scores, *controls)]
        above = values[0] - np.max(values[1:], axis=0)
        low, high = metrics.bootstrap_interval(above)
        found[name] = {
            "mean": float(above.mean()), "low": low, "high": high, "images": above.tolist()
        }  # fmt: skip
    return found


def _details(verdict: Verdict, result: Mapping, identification: Identification | None) -> list[str]:
    """The lines below the verdict: what it rests on, and what weakens it."""
    lines = []
    if identification is not None:
        found = ", ".join(map(str, verdict.identified)) or "none"
        lines.append(
            f"ranks among {identification.candidates - 1} decoys per image, by "
            f"{verdict.metric.upper()}: p = {identification.p:.2g} (all images together "
            f"{identification.batch_p:.2g}); identified one by one, corrected for their number: "
            f"{found}"
        )
        for name, control in (result["controls"] or {}).items():
            if control["identification_p"] <= ALPHA:
                lines.append(
                    f"caution: the ranks of control {name}, which knows nothing of the client's "
                    f"gradient, have p = {control['identification_p']:.2g}: these decoys may be "
                    "unlike the true images in kind"
                )
    paired = result["paired"]
    if paired is not None:
        decoys, signs = (
            "" if paired[key] is None else f"; p = {paired[key]:.2g} by {what}"
            for key, what in (("p", "the decoys"), ("signs_p", "signs, which decides nothing"))
        )
        lines.append(
            f"against the gradient of other images, image by image: {verdict.metric.upper()} "
            f"{paired['mean']:+.{LEAKAGE_DIGITS[verdict.metric]}f}{decoys}{signs}"
        )
    if result["leakage"] is None:
        return lines
    above = result["leakage"][verdict.metric]["images"]
    lines += [
        "against each image's best control: "
        + ", ".join(difference(name, of) for name, of in result["leakage"].items())
        + f"; {sum(value > 0 for value in above)} of {len(above)} images stand above every control "
        f"in {verdict.metric.upper()}",
        "against one control alone: "
        + "; ".join(
            f"{name} {difference(verdict.metric, control['leakage'][verdict.metric])}"
            for name, control in result["controls"].items()
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
    """The gradient information ratio as a table to print.

    columns: field of `inversion.leakage.Information` → (B,) values, with "label" before them.
    protected: whether what the client sent was changed before.
    """
    titles = {
        "label": "label", "confidence": "confidence", "predicted": "predicted",
        "predicted_confidence": "its confidence", "norm": "norm", "squared_l2": "squared L2",
        "cosine_distance": "cosine distance", "sign_rate": "equal signs %",
        "information": "information", "ratio": "ratio %",
    }  # fmt: skip
    rows = [[i, *values] for i, values in enumerate(zip(*columns.values(), strict=True))]
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
