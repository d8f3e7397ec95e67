"""Measures the layerwise attack: how far the gradient is solved, and what images that gives.

    python -m benchmarks.layerwise PART --rows docs/rows [--weights FILE]

The parts are those of CASES. Every case attacks photographs with known labels, and sets beside the
images what the same attack makes of the gradient of other images with the same labels, the decoder
alone, the mean of public photographs, and grey and mean-coloured images. Parts "matching" and
"noise" also match gradients for as long as the layerwise attack took, times a factor. It appends
one row per case to layerwise.csv and one per tensor to layerwise_tensors.csv.
"""

import argparse
import csv
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from inversion.audit.certificate import predictions, true_errors
from inversion.audit.inputs import Case as AuditCase
from inversion.audit.inputs import Sealed, make_case
from inversion.layerwise.attack import Recovered, layerwise_attack
from inversion.layerwise.images import PUBLIC_IMAGES
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact
from inversion.settings import AttackSettings, Loop, Weights
from models.build import build_model, init_head, load_weights
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss, Update, whole_batch_gradient
from models.reading import target_from_checkpoint
from models.target import GroundTruth, Protection, Target
from train.datasets import DATASETS, normalise
from train.photos import photo_batch
from train.privacy import Mechanism, protect_per_sample
from utils import metrics
from utils.console import table
from utils.device import device_name
from utils.image_files import public_photographs
from utils.matching import assign
from utils.pictures import save_panels
from utils.shard import ALONE
from utils.tensor_files import load_plain

SPEC = DATASETS["photos"]
#: Batch number of the other images whose gradient is the control.
OTHER = 7
#: Clipping norm of per-sample protection.
CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """Describes one client and what happened to its gradient."""

    arch: str = "resnet18"
    size: int = 32
    batch: int = 4
    seed: int = 0
    #: Number of the batch of `photos`.
    index: int = 0
    train_mode: bool = False
    #: Whether the network's body has the weights of --weights, else random ones.
    trained: bool = False
    #: A name in HEAD_INITS.
    head: str = "normal"
    #: "none", "relative" (to each tensor's root mean square), "float16", "bfloat16", "per-sample"
    #: (clipping to CLIP, then noise, which the client reports).
    noise: str = "none"
    #: Standard deviation of the noise, for "per-sample" per entry of the gradient.
    level: float = 0.0
    #: Match gradients too, for this many times the time that the layerwise attack took; 0 for not.
    matching: float = 0.0


def cnn6(num_classes: int) -> nn.Module:
    """Build a network of R-GAP's kind for 32 px: six convolutions, leaky ReLU, no pooling, no bias.

    As the CNN6 of Zhu & Blaschko (2021), but with a head for several classes.
    """
    layers: list[nn.Module] = []
    shapes = ((3, 12, 4, 2, 2), (12, 36, 3, 2, 1), (36, 36, 3, 1, 1), (36, 36, 3, 1, 1),
              (36, 64, 3, 2, 1), (64, 128, 3, 1, 1))  # fmt: skip
    for source, channels, kernel, stride, padding in shapes:
        layers.append(nn.Conv2d(source, channels, kernel, stride, padding, bias=False))
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3200, num_classes, bias=False))


SEEDS = range(5)
LEVELS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
NETWORKS = [
    Case("convnet", batch=1), Case("convnet", batch=4), Case("convnet", batch=2, train_mode=True),
    Case("vgg11_bn", batch=1), Case("vgg11_bn", batch=4), Case("vgg11", batch=1),
    Case("lenet", batch=1, head="keep"), Case("lenet", batch=2, head="keep"),
    Case("lenet", batch=7, head="keep"), Case("resnet34", batch=4),
    *(Case("cnn6", batch=1, seed=seed, head="keep", matching=5.0) for seed in (0, 1, 2)),
]  # fmt: skip
CASES: dict[str, list[Case]] = {
    "eval": [Case(seed=seed) for seed in SEEDS],
    "crops": [Case(seed=seed, index=1) for seed in SEEDS],
    "train": [Case(seed=seed, train_mode=True) for seed in SEEDS],
    "trained": [
        Case(trained=True, train_mode=mode, head=head)
        for mode in (False, True)
        for head in ("normal", "keep")
    ],
    "64": [Case(size=64, batch=count, seed=seed) for count in (1, 4) for seed in (0, 1)]
    + [Case(size=64, batch=8)],
    "cifar": [Case("resnet18_cifar", batch=count) for count in (1, 2, 4, 7, 8)]
    + [Case("resnet18_cifar", batch=2, seed=1), Case("resnet18_cifar", batch=4, train_mode=True)],
    "networks": NETWORKS,
    "matching": [Case(matching=1.0), Case(train_mode=True, matching=1.0)],
    "noise": [Case(noise="relative", level=level, matching=1.0) for level in LEVELS]
    + [Case(noise=kind, matching=1.0) for kind in ("float16", "bfloat16")]
    + [Case(noise="per-sample", level=level, matching=1.0) for level in (1e-8, 1e-6, 1e-4)],
}


@dataclass(frozen=True)
class Client:
    """Holds what one client sent, what another one would have, and the truth."""

    model: nn.Module
    target: Target
    other: Target
    #: (B, 3, H, W) in [0, 1].
    true: Tensor
    y: Tensor


def client(case: Case, weights: dict[str, Tensor] | None) -> Client:
    """Compute the gradient that a case describes, and that of other images."""
    torch.manual_seed(case.seed)
    shape = (3, case.size, case.size)
    model = cnn6(SPEC.class_count) if case.arch == "cnn6" else None
    model = model or build_model(case.arch, SPEC.class_count, shape)
    if case.trained:
        if weights is None:
            raise SystemExit("--weights: part trained needs them; see benchmarks/train_network.py")
        load_weights(model, weights)
        torch.manual_seed(1000 + case.seed)
    init_head(model, case.head)
    distinct = None if case.index == 0 else min(case.batch, SPEC.class_count)
    true, y = photo_batch(
        case.batch, case.index, case.size, seed=case.seed, distinct_labels=distinct
    )
    other, labels = photo_batch(case.batch, OTHER, case.size, seed=case.seed, distinct_labels=None)
    return Client(model, _target(case, model, true, y), _target(case, model, other, y), true, y)


def _target(case: Case, model: nn.Module, images: Tensor, y: Tensor) -> Target:
    """Return what the attacker sees of the client with these images (B, 3, H, W) in [0, 1]."""
    x, loss = normalise(images, SPEC), ClientLoss(case.train_mode)
    sent = whole_batch_gradient(model, x, y, loss, moments=True)
    generator = torch.Generator().manual_seed(5)
    gradient, protection = sent.gradient, None
    if case.noise == "relative":
        gradient = tuple(
            g + case.level * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)
            for g in gradient
        )
    elif case.noise == "per-sample":
        how = Mechanism(case.level, CLIP, generator)
        gradient = protect_per_sample(gradient, how, model, x, y, loss).gradient
        multiplier = case.level * case.batch / CLIP
        protection = Protection("per-sample", case.level, CLIP, noise_multiplier=multiplier)
    elif case.noise != "none":
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[case.noise]
        gradient = tuple(g.to(dtype) for g in gradient)
    shape = (3, case.size, case.size)
    task = Task(case.arch, case.batch, shape, SPEC.class_count, SPEC.mean, SPEC.std, loss)
    update = Update(gradient, sent.bn_mean, sent.bn_var)
    return target_from_checkpoint(make_checkpoint(model, update, task, protection=protection))


def scores(images: Tensor, true: Tensor) -> tuple[float, float, float]:
    """Return mean PSNR, mean SSIM and lowest PSNR of images in [0, 1] after the best pairing."""
    paired = images[assign(images, true)]
    psnr = metrics.psnr(paired, true)
    return psnr.mean().item(), metrics.ssim(paired, true).mean().item(), psnr.min().item()


def matched(of: Client, seconds: float, seed: int) -> Tensor:
    """Match gradients for about so many CPU seconds, as the README's attack does; (B, 3, H, W)."""
    settings = AttackSettings(Weights(priors={"tv": 1e-4}), Loop(1, 0.05))
    case = audit_case(of, settings)
    start = time.process_time()
    x = case.start(seed)
    loop = Loop(3, 0.05, signed=True, box=of.target.box)
    reconstruct(functools.partial(exact, case.objective), x, loop)
    steps = max(3, int(3 * seconds / (time.process_time() - start)))
    loop = replace(loop, steps=steps, keep_best=True)
    return case.images(reconstruct(functools.partial(exact, case.objective), x, loop).x)


def audit_case(of: Client, settings: AttackSettings) -> AuditCase:
    """Return the attacker's case, as run.py makes it."""
    return make_case(settings, of.model, of.target, of.y, None, torch.device("cpu"), ALONE)


def run(case: Case, weights: dict[str, Tensor] | None) -> tuple[dict, list[dict], dict]:
    """Attack one case; return its row, the rows of its tensors, and its images by name."""
    of = client(case, weights)
    public = normalise(public_photographs(PUBLIC_IMAGES, of.target.image_shape), SPEC)
    start = time.process_time()
    found = layerwise_attack(of.model, of.target, of.y, public)
    seconds = time.process_time() - start
    audit = audit_case(of, AttackSettings(Weights(), Loop(1, 1.0)))
    images = audit.images(found.images)
    psnr, ssim, worst = scores(images, of.true)
    other = layerwise_attack(of.model, of.other, of.y, public)
    control = {
        "other_gradient": audit.images(other.images),
        "mean_image": public_photographs(128, of.target.image_shape).mean(0).expand_as(of.true),
    }
    if found.decoder_only is not None:
        control["decoder_only"] = audit.images(found.decoder_only)
    flat = metrics.baselines(of.true)
    control |= {"grey": flat["grey"], "mean_colour": flat["mean colour"]}
    row = vars(case) | {
        "certified": len(found.certified), "tensors": len(found.layers),
        "deepest": found.certified[-1].name if found.certified else "", "method": found.method,
        "psnr": psnr, "ssim": ssim, "lowest_psnr": worst,
    }  # fmt: skip
    for name in ("other_gradient", "decoder_only", "mean_image", "grey", "mean_colour"):
        figures = scores(control[name], of.true) if name in control else ("", "")
        row |= {f"{name}_psnr": figures[0], f"{name}_ssim": figures[1]}
    row |= {"matching_psnr": "", "matching_ssim": ""}
    shown = {"truth": of.true, "layerwise": images[assign(images, of.true)]}
    if case.matching:
        rival = matched(of, case.matching * seconds, case.seed)
        shown["matching"] = rival[assign(rival, of.true)]
        figures = scores(rival, of.true)
        row |= {"matching_psnr": figures[0], "matching_ssim": figures[1]}
    row |= {"cpu_seconds": seconds, "stopped": found.stopped, "device": device_name(audit.device)}
    return row, tensor_rows(case, audit, found, of), shown


def tensor_rows(case: Case, audit: AuditCase, found: Recovered, of: Client) -> list[dict]:
    """Return one row per recovered tensor: its certificate, RA-i and its true error."""
    x = normalise(of.true, SPEC)
    errors = true_errors(audit, found, Sealed(GroundTruth(x, of.y), None, False, None))
    ranks = predictions(audit, found.layers)
    names = ("arch", "size", "batch", "seed", "index", "train_mode", "trained", "head", "noise")
    shared = {name: vars(case)[name] for name in (*names, "level")}
    return [
        shared
        | {name: value for name, value in vars(layer).items() if name != "used_by"}
        | {"ra": ranks.get(layer.name, ""), "true_error": errors.get(layer.name, "")}
        for layer in found.layers
    ]


def append(rows: Sequence[dict], path: Path) -> None:
    """Append rows to a CSV, with a header where the file is new.

    Raises SystemExit, and writes nothing, where the file has other columns.
    """
    header = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            there = next(csv.reader(file), [])
        if there != header:
            apart = ", ".join(sorted(set(there) ^ set(header))) or "their order"
            raise SystemExit(f"{path}: has other columns than these rows ({apart}); move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def main() -> None:
    """Attack every case of a part, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=CASES)
    parser.add_argument("--rows", type=Path, help="folder for the raw rows")
    parser.add_argument("--images", type=Path, help="folder for a picture of every case")
    parser.add_argument("--weights", help="weights that benchmarks/train_network.py wrote")
    args = parser.parse_args()
    weights = None if args.weights is None else load_plain(args.weights)
    shown = []
    for number, case in enumerate(CASES[args.part]):
        row, tensors, images = run(case, weights)
        row = {"part": args.part, **row}
        if args.rows:
            append([row], args.rows / "layerwise.csv")
            append(tensors, args.rows / "layerwise_tensors.csv")
        if args.images:
            save_panels([*images.items()], args.images / f"{args.part}-{number}.png")
        names = ("arch", "size", "batch", "seed", "train_mode", "deepest", "psnr", "ssim")
        shown.append([row[name] for name in (*names, "other_gradient_psnr", "cpu_seconds")])
        print(shown[-1], row["stopped"], flush=True)
    header = ["arch", "px", "B", "seed", "train mode", "deepest", "PSNR", "SSIM"]
    print(table([*header, "other gradient", "CPU s"], shown))


if __name__ == "__main__":
    main()
