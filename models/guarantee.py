"""Says what a client's defence is, which privacy follows from it, and what bounds any attacker."""

import math
from statistics import NormalDist

#: Mode of a `Protection` without differential privacy → why none follows.
NO_PRIVACY = {
    "batch": "the batch is clipped, not each image",
    "topk": "the entries sent are exact, and one image can change which ones these are",
    "random": "the entries sent are exact",
    "percentile": (
        "what is sent is computed from the images without noise, and gamma bounds each entry, not "
        "the part of one image"
    ),
    "svt": (
        "entries are cut to gamma after their noise is added, not before, so the noise does not "
        "cover what an image can change; and the epsilons of the entries sent would add up"
    ),
    "int8": "the rounding is the same every time, so equal images send equal gradients",
    "sign": "the signs and the scales are computed without noise",
}


def described(
    mode: str, *, sigma: float, clip: float | None, amount: float | None, largest: float | None
) -> str:
    """Describe what a `Protection` with these fields did to the gradient, in a few words."""
    cut = "" if largest is None else f", cut to ±{largest:g}"
    if mode in ("topk", "random"):
        which = "largest" if mode == "topk" else "randomly drawn"
        return f"{mode}, {_of(amount)} of the entries, the {which} ones"
    if mode == "percentile":
        return f"percentile, entries of at least percentile {_of(amount)} of the magnitudes{cut}"
    if mode == "svt":
        noise = f"noise with standard deviation {sigma:.3g} before the cut"
        return f"svt, up to {_of(amount)} of the entries{cut}, {noise}"
    if mode == "int8":
        return "int8, every tensor rounded to 255 values"
    if mode == "sign":
        return "sign, the signs alone and one scale per tensor"
    clipping = "no clipping" if clip is None else f"clipped to {clip:g}"
    return f"{mode}, {clipping}, noise with standard deviation {sigma:g} per entry"


def _of(amount: float | None) -> str:
    return "an unknown amount" if amount is None else f"{amount:g}"


def gaussian_mu(noise_multiplier: float) -> float | None:
    """Return μ of Gaussian differential privacy of one release of the Gaussian mechanism.

    noise_multiplier ≥ 0: σ B / C, the noise in the sum of clipped gradients over their largest norm
    C. The sum of B public moves by C at most with one sample more or less, so μ = C / (σ B)
    (Dong, Roth and Su, "Gaussian differential privacy", 2022, theorem 1); `composed_mu` gives that
    of several releases. It does not use subsampling, which would make it smaller. None without
    noise, where there is no μ.
    """
    return 1 / noise_multiplier if noise_multiplier > 0 else None


def composed_mu(mu: float, steps: int) -> float:
    """Return μ of `steps` releases together, √steps · μ (Dong, Roth and Su, corollary 2)."""
    return math.sqrt(steps) * mu


def reconstruction_bound(kappa: float, mu: float) -> float:
    """Return the largest probability with which any attacker names what a release was made of.

    kappa in [0, 1]: the probability of the same success by guessing, without the release: 1 / n of
    n candidates that are equally likely. mu ≥ 0: of the release's Gaussian differential privacy.
    It is Φ(Φ⁻¹(κ) + μ), which is 1 − G_μ(κ) with G_μ the trade-off function (Kaissis et al.,
    "Bounding data reconstruction attacks with the hypothesis testing interpretation of
    differential privacy", 2023). It holds for an attacker who knows all other images.

    Raises ValueError outside these ranges.
    """
    if not (0 <= kappa <= 1 and mu >= 0):
        raise ValueError(f"kappa {kappa} is not in [0, 1], or mu {mu} is below 0")
    if kappa in (0, 1):
        return float(kappa)
    moved = NormalDist().inv_cdf(kappa) + mu
    return 0.5 * math.erfc(-moved / math.sqrt(2))


#: Equally likely candidates of which `bound_sentence` says how often an attacker names the right
#: one: as many as the identification test has, with its 99 decoys.
CANDIDATES = 100


def bound_sentence(mu: float, steps: int) -> str:
    """Say what μ of one gradient means for any attacker, and for `steps` gradients together."""
    many = ""
    if steps > 1:
        bound = reconstruction_bound(1 / CANDIDATES, composed_mu(mu, steps))
        many = f"; after {steps} gradients (mu {composed_mu(mu, steps):.4g}) of at most {bound:.3g}"
    bound = reconstruction_bound(1 / CANDIDATES, mu)
    return (
        f"Gaussian differential privacy with mu {mu:.4g}: whatever the attack, it names the right "
        f"one of {CANDIDATES} equally likely images with a probability of at most {bound:.3g}"
        f"{many}; sampling is not counted on"
    )
