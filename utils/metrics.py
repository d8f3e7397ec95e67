"""Scores reconstructed images and labels against the true ones.

Images are (B, C, H, W) in [0, 1]. Every metric returns one number per image.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError
from utils.tensor_files import load_plain

#: File name of torchvision's AlexNet, whose features LPIPS compares.
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"
#: Side and standard deviation, in pixels, of the Gaussian window of `ssim`.
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
#: Side, in pixels, of the uniform window of `ssim_original`.
SSIM_ORIGINAL_WINDOW = 7
#: How many pixel values, of both images of all pairs, `ssim` processes at once.
SSIM_CHUNK = 2**23
#: Number of bootstrap resamples.
RESAMPLES = 9999
#: Share of the resampled means that the bootstrap interval contains.
CONFIDENCE = 0.95
#: Shortest side, in pixels, of an image that LPIPS can score.
LPIPS_SMALLEST = 31
#: The most that the PSNR of one image, in dB, contributes to a mean. An exact image has an infinite
#: PSNR, which would make the mean infinite.
PSNR_CEILING = 100.0


def mse(x: Tensor, x_true: Tensor) -> Tensor:
    """Return the mean squared error per image: (B,), in [0, 1], lower is better."""
    return (x - x_true).square().flatten(1).mean(1)


def psnr(x: Tensor, x_true: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio per image in dB: (B,), higher is better.

    The peak is 1, the range of the images. The PSNR of an exact image is infinite.
    """
    return -10 * mse(x, x_true).log10()


def ssim(x: Tensor, x_true: Tensor) -> Tensor:
    """Return the structural similarity per image: (B,) of float64, at most 1, higher is better.

    Defined by Wang et al. (2004) with their Gaussian window (11 × 11, σ 1.5); the mean is over
    channels and over all places where the whole window lies inside the image. The tests compare it
    with scikit-image's `structural_similarity`, which takes one pair at a time. The score is NaN
    for images with a side under 11 pixels.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        return torch.full((len(x),), float("nan"), dtype=torch.float64)
    pairs = torch.stack([x.double().cpu(), x_true.double().cpu()], 1)
    size = max(1, SSIM_CHUNK // pairs[0].numel())
    return torch.cat([_ssim(*part.unbind(1)) for part in pairs.split(size)])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return `ssim` of float64 images on the CPU, all at once."""
    rows, columns = (_windows(side).to(x) for side in x.shape[-2:])

    def smooth(values: Tensor) -> Tensor:
        return rows @ values @ columns.T

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x * mean_x, smooth(y * y) - mean_y * mean_y
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _windows(side: int) -> Tensor:
    """Return the Gaussian windows along a side of `side` pixels: (side − 10, side), float64.

    Each row is one position of the window. Products with such small dense matrices are several
    times faster here than convolutions.
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    places = torch.zeros(side - SSIM_WINDOW + 1, side, dtype=torch.float64)
    for row in range(len(places)):
        places[row, row : row + SSIM_WINDOW] = window / window.sum()
    return places


def ssim_original(x: Tensor, x_true: Tensor) -> Tensor:
    """Return the structural similarity per image as the original (E2EGI, 2023) computes it: (B,).

    It is scikit-image's default, a uniform window of 7 × 7, on images rounded to 8 bits; the mean
    is over channels. The score is NaN for images with a side under 7 pixels.
    """
    from skimage.metrics import structural_similarity  # only where this window is asked for

    if min(x.shape[-2:]) < SSIM_ORIGINAL_WINDOW:
        return torch.full((len(x),), float("nan"), dtype=torch.float64)
    pairs = (
        (255 * images.double().cpu()).round().clamp(0, 255).byte().numpy() for images in (x, x_true)
    )
    scores = [
        structural_similarity(a, b, win_size=SSIM_ORIGINAL_WINDOW, data_range=255, channel_axis=0)
        for a, b in zip(*pairs, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)


def load_lpips(path: str | None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return LPIPS (Zhang et al., 2018; AlexNet, version 0.1) with the backbone in file `path`.

    Without `path` it looks for LPIPS_BACKBONE in the cache of torch hub, and returns None if the
    file is not there. It downloads nothing. The returned function gives (B,) scores, lower is
    better; the score is NaN for images with a side under 31 pixels.

    Raises InputError, naming `--lpips-weights`, if a named file cannot be used.
    """
    named = path is not None
    path = path or os.path.join(torch.hub.get_dir(), "checkpoints", LPIPS_BACKBONE)
    if not os.path.isfile(path):
        if named:
            raise InputError(f"--lpips-weights {path}: no such file; give {LPIPS_BACKBONE}")
        return None
    import lpips  # with torchvision it takes a second, and few runs have its backbone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecation of what lpips passes
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    # lpips cuts AlexNet's `features` into slices and keeps the layers' numbers as names.
    layers = {
        name: layer for part in network.net.children() for name, layer in part.named_children()
    }
    try:
        state = load_plain(path)
        for name, layer in layers.items():
            own = layer.state_dict()
            layer.load_state_dict({key: state[f"features.{name}.{key}"] for key in own})
    except (InputError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f"--lpips-weights {path}: holds no AlexNet of torchvision; give {LPIPS_BACKBONE}"
        ) from error

    def score(x: Tensor, x_true: Tensor) -> Tensor:
        if min(x.shape[-2:]) < LPIPS_SMALLEST:
            return torch.full((len(x),), float("nan"))
        pairs = [(t.float().cpu().expand(-1, 3, -1, -1) * 2 - 1) for t in (x, x_true)]
        with torch.no_grad():
            return network(*pairs).flatten()

    return score


#: Name → function(x, x_true) that returns (B,) scores. A run adds "lpips" if it has the backbone.
METRICS = {"mse": mse, "psnr": psnr, "ssim": ssim}
#: Value of `--ssim` → the function that a run uses as "ssim".
SSIMS = {"gaussian": ssim, "original": ssim_original}
#: The metrics of which a lower score is better.
LOWER_IS_BETTER = {"mse", "lpips"}


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of the mean of `values` (B,).

    It is the percentile bootstrap (Efron, 1979; scipy) with a fixed seed. Both ends are NaN for
    fewer than two values.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    from scipy.stats import bootstrap  # half a second, of an attack that scores alone

    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def label_accuracy(y: Tensor, y_true: Tensor) -> float:
    """Return the overlap of two label multisets, Σ_k min(n_k, n̂_k) / B, in [0, 1].

    y, y_true: (B,) class indices, in any order; n̂_k and n_k are their counts of class k.
    """
    num_classes = int(max(y.max(), y_true.max())) + 1
    counts, true = (torch.bincount(v.cpu(), minlength=num_classes) for v in (y, y_true))
    return torch.minimum(counts, true).sum().item() / len(y_true)


def existence_accuracy(y: Tensor, y_true: Tensor, num_classes: int) -> float:
    """Return the share of classes whose presence or absence in the batch is right, in [0, 1].

    It is the LeAcc of iLRG (Ma et al., ICLR 2023). Absent classes count too, so with many more
    classes than labels it is near 1 for any guess.
    """
    found, true = (torch.bincount(v.cpu(), minlength=num_classes) > 0 for v in (y, y_true))
    return (found == true).double().mean().item()


@dataclass(frozen=True)
class Scores:
    """The scores of a batch, by the name of the metric."""

    #: One score per image, in the order of the true images. The PSNR of an exact image is infinite.
    images: dict[str, list[float]]
    #: Mean over the images, in which each PSNR counts up to PSNR_CEILING.
    mean: dict[str, float]
    #: Standard deviation of the population, of the same values as the mean.
    std: dict[str, float]


def score(x: Tensor, x_true: Tensor, metrics: dict[str, Callable]) -> Scores:
    """Score image i of `x` against image i of `x_true` with every metric."""
    values = {name: metric(x, x_true).double().cpu() for name, metric in metrics.items()}
    counted = {
        name: v.clamp(max=PSNR_CEILING) if name == "psnr" else v for name, v in values.items()
    }
    return Scores(
        {name: v.tolist() for name, v in values.items()},
        {name: v.mean().item() for name, v in counted.items()},
        {name: v.std(correction=0).item() for name, v in counted.items()},
    )


def baselines(x_true: Tensor) -> dict[str, Tensor]:
    """Return images that need no attack, for comparison: name → (B, C, H, W).

    "grey" is mid grey. "mean colour" is the mean colour of each true image, which an attacker does
    not know.
    """
    mean = x_true.mean((-2, -1), keepdim=True)
    return {"grey": torch.full_like(x_true, 0.5), "mean colour": mean.expand_as(x_true)}
