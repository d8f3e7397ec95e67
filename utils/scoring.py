"""Scoring a reconstruction against the truth: pairing, scores, what images score that need no
attack or no gradient, and what of the reconstruction is therefore leakage."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from utils import metrics
from utils.images import decibels
from utils.report import table

#: Metrics in which leakage is told: name → digits to print.
LEAKAGE_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}
#: Bootstrap intervals of fewer images are said to be too narrow.
FEW_IMAGES = 8
#: In dB: what counts as clearly above the controls for an image, and as clearly below for all.
CLEAR_DIFFERENCE = 1.0
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
    controls: Mapping[str, Tensor] | None = None,
) -> tuple[dict, str]:
    """Score images `found` against `true`, both (B, C, H, W) in [0, 1].

    Pairs by the best one-to-one assignment, or `by_index`. Beside the scores stand those of
    images that need no attack (`metrics.baselines`): an image whose PSNR is not above the
    better of them is no reconstruction. controls: name → (B, C, H, W) in [0, 1], what comes out
    without the client's gradient, paired by the same rule; `leakage` sets the scores against them.

    Returns the `metrics` entry of result.json and a table to print. In the entry the PSNR of an
    exact image is None and `exact` true; metrics that do not apply are None or NaN.
    """

    def pairing_of(images):
        return list(range(len(true))) if by_index else metrics.assign(images, true)

    order = pairing_of(found)
    used = {**metrics.METRICS, **({"lpips": lpips_score} if lpips_score else {})}
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
    summaries = {"mean": scores.mean, "std": scores.std}
    summaries |= {f"{label} image": reference.mean for label, reference in references.items()}
    summaries |= {f"control: {label}": control.mean for label, control in control_scores.items()}
    rows += [
        [title, "", "", *(values.get(name, math.nan) for name in names), ""]
        for title, values in summaries.items()
    ]
    header = ["image", "paired with", "label true / used", "MSE", "PSNR dB", "SSIM", "LPIPS"]
    below = sum(not image["above_baselines"] for image in images)
    verdict = (
        f"{below} of {len(true)} images score no better in PSNR than a flat image: by that measure "
        "those are no reconstructions (for dark images see SSIM and the pictures)"
        if below
        else "every image scores above a grey image and above its own mean colour"
    )
    text = (
        f"{table([*header, 'reconstruction?'], rows, separated=len(summaries))}\n"
        f"label accuracy {100 * metrics.label_accuracy(y_found, y_true):.1f} %; paired by "
        f"{pairing}; {verdict}"
    )
    if result["exact_images"]:
        text += (
            f"\n{result['exact_images']} of {len(true)} images are exact: in the mean their PSNR, "
            f"which is infinite, counts as {metrics.PSNR_CEILING:g} dB"
        )
    if controls:
        alone = {name: control["leakage"] for name, control in result["controls"].items()}
        text += f"\n{leakage_verdict(result['leakage'], alone)}"
    return result, text


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
        sign = -1 if name in metrics.LOWER_IS_BETTER else 1
        values = [np.minimum(sign * np.array(of[name]), 100) for of in (scores, *controls)]
        above = values[0] - np.max(values[1:], axis=0)
        low, high = metrics.bootstrap_interval(above)
        found[name] = {
            "mean": float(above.mean()), "low": low, "high": high, "images": above.tolist()
        }  # fmt: skip
    return found


def leakage_verdict(found: Mapping[str, Mapping], alone: Mapping[str, Mapping]) -> str:
    """What the differences to the controls say of leakage, in words.

    found: of `leakage` with all controls; alone: control → the same with that one only. There is
    leakage where the interval of some metric lies above 0. There is none where no image stands
    above every control, or all intervals lie below 0 and none clearly does. Between the two it is
    not shown on average. One image has no interval: its difference decides.
    """
    above = found["psnr"]["images"]
    highest = max(range(len(above)), key=above.__getitem__)
    comes = (
        f"image {highest} the most, by" if above[highest] > 0 else f"image {highest} is nearest,"
    )
    if any(_bound(of, "low") > 0 for of in found.values()):
        verdict = "leakage above the prior"
    elif max(above) <= 0 or (
        max(above) <= CLEAR_DIFFERENCE and all(_bound(of, "high") < 0 for of in found.values())
    ):
        verdict = "no leakage above the prior"
    else:
        verdict = "leakage above the prior not shown on average"
        comes = f"look at them: {comes}"
    lines = [
        f"{verdict}: {', '.join(_difference(name, of) for name, of in found.items())} over "
        f"{len(above)} image(s), against each one's best of the controls {', '.join(alone)}",
        "against one control alone: "
        + "; ".join(
            f"{control} {_difference('psnr', differences['psnr'])}"
            for control, differences in alone.items()
        ),
        f"{sum(value > 0 for value in above)} of {len(above)} images stand above every control in "
        f"PSNR, {comes} {above[highest]:+.2f} dB",
    ]
    if _bound(found["psnr"], "high") < -CLEAR_DIFFERENCE:
        lines.append(
            "the attack does worse than without the gradient: there is nothing to find, or it is "
            "badly tuned for it (try more --TV, or the search); nothing follows about a defence"
        )
    if 1 < len(above) < FEW_IMAGES:
        lines.append(f"fewer than {FEW_IMAGES} images: the interval is too narrow, a hint at most")
    return "\n".join(lines)


def _bound(of: Mapping, which: str) -> float:
    return of["mean"] if math.isnan(of[which]) else of[which]


def _difference(name: str, of: Mapping) -> str:
    digits = f"+.{LEAKAGE_DIGITS[name]}f"
    mean, low, high = (format(of[key], digits) for key in ("mean", "low", "high"))
    text = f"{name.upper()} {mean}{' dB' if name == 'psnr' else ''}"
    return text if math.isnan(of["low"]) else f"{text} (95 % interval {low} to {high})"


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
