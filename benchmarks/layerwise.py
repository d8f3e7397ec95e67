"""Measures the layerwise attack: how far the gradient is solved, and what images that gives.

    python -m benchmarks.layerwise PART --rows docs/rows [--weights FILE] [--only 0,3]

The parts are those of CASES. Every case attacks photographs with known labels, and sets beside the
images what the same attack makes of the gradient of other images with the same labels (where the
case asks for it), the decoder alone, the mean of public photographs, and grey and mean-coloured
images. Cases with `matching` also match gradients for as long as the layerwise attack took, times a
factor. It appends one row per case, as soon as it is measured, and one per tensor to the files of
layerwise_rows.py. A case that needs more memory than --memory has a row without figures.
"""

import argparse
import functools
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.layerwise_cases import CASES, CLIP, Case
from benchmarks.layerwise_rows import write
from benchmarks.layerwise_scores import decoys, depth, identification, labels
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
from utils.device import device_name, peak_memory_mib
from utils.image_files import public_photographs
from utils.matching import assign
from utils.pictures import save_panels
from utils.shard import ALONE
from utils.tensor_files import load_plain

SPEC = DATASETS["photos"]
#: Batch number of the other images whose gradient is the control.
OTHER = 7


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


@dataclass(frozen=True)
class Client:
    """Holds what one client sent, what another one would have, and the truth."""

    model: nn.Module
    target: Target
    #: What a client with other images of these labels would have sent; None for no control.
    other: Target | None
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
            raise SystemExit("--weights: this part needs them; see benchmarks/train_network.py")
        load_weights(model, weights)
        torch.manual_seed(1000 + case.seed)
    init_head(model, case.head)
    distinct = None if case.index == 0 else min(case.batch, SPEC.class_count)
    distinct = case.classes_used or distinct
    true, y = photo_batch(
        case.batch, case.index, case.size, seed=case.seed, distinct_labels=distinct
    )
    other = None
    if case.control:
        images, _ = photo_batch(case.batch, OTHER, case.size, seed=case.seed, distinct_labels=None)
        other = _target(case, model, images, y)
    return Client(model, _target(case, model, true, y), other, true, y)


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


class Deadline:
    """Tells whether the process has taken so many more CPU seconds, and whether it said so."""

    def __init__(self, cpu_seconds: float):
        self.end, self.passed = time.process_time() + cpu_seconds, False

    def __call__(self) -> bool:
        """Return whether they are over, and keep the answer."""
        self.passed = time.process_time() > self.end
        return self.passed


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


def run(
    case: Case, weights: dict[str, Tensor] | None, cpu_seconds: float = float("inf")
) -> tuple[dict, list[dict], dict]:
    """Attack one case; return its row, the rows of its tensors, and its images by name.

    The attack ends, with what there is, once it has taken so many `cpu_seconds`; so does the one on
    the gradient of other images.
    """
    of = client(case, weights)
    public = normalise(public_photographs(PUBLIC_IMAGES, of.target.image_shape), SPEC)
    start = time.process_time()
    late = Deadline(cpu_seconds)
    found = layerwise_attack(of.model, of.target, of.y, public, should_stop=late)
    seconds = time.process_time() - start
    stopped = (
        f"{found.stopped}; ended after {cpu_seconds:g} CPU s" if late.passed else found.stopped
    )
    audit = audit_case(of, AttackSettings(Weights(), Loop(1, 1.0)))
    images, among = audit.images(found.images), decoys(of.y, case.size, case.seed)
    psnr, ssim, worst = scores(images, of.true)
    y_found = of.y if found.labels is None else found.labels
    row = vars(case) | {
        "certified": len(found.certified), "tensors": len(found.layers),
        "deepest": found.certified[-1].name if found.certified else "", "method": found.method,
        "psnr": psnr, "ssim": ssim, "lowest_psnr": worst,
    }  # fmt: skip
    row |= labels(found, of.y, of.y) | depth(of.model, found, of.target.image_shape)
    row |= identification("", images, y_found, of.true, of.y, among)
    for name, control in controls(of, found, audit, public, cpu_seconds).items():
        figures = scores(control, of.true)
        row |= {f"{name}_psnr": figures[0], f"{name}_ssim": figures[1]}
    shown = {"truth": of.true, "layerwise": images[assign(images, of.true)]}
    if case.matching:
        rival = matched(of, case.matching * seconds, case.seed)
        shown["matching"] = rival[assign(rival, of.true)]
        figures = scores(rival, of.true)
        row |= {"matching_psnr": figures[0], "matching_ssim": figures[1]}
        row |= identification("matching_", rival, of.y, of.true, of.y, among)
    row |= {"cpu_seconds": seconds, "stopped": stopped, "device": device_name(audit.device)}
    row["peak_mib"] = peak_memory_mib(audit.device)
    return row, tensor_rows(case, audit, found, of), shown


def controls(
    of: Client, found: Recovered, audit: AuditCase, public: Tensor, cpu_seconds: float
) -> dict[str, Tensor]:
    """Return what the client's gradient is not needed for, (B, 3, H, W) in [0, 1], by name."""
    control = {}
    if of.other is not None:
        late = Deadline(cpu_seconds)
        other = layerwise_attack(of.model, of.other, of.y, public, should_stop=late)
        control["other_gradient"] = audit.images(other.images)
    if found.decoder_only is not None:
        control["decoder_only"] = audit.images(found.decoder_only)
    mean = public_photographs(128, of.target.image_shape).mean(0)
    control["mean_image"] = mean.expand_as(of.true)
    flat = metrics.baselines(of.true)
    return control | {"grey": flat["grey"], "mean_colour": flat["mean colour"]}


def attempt(
    case: Case, weights: dict[str, Tensor] | None, cpu_seconds: float, memory: float | None
) -> tuple[dict, list[dict], dict]:
    """Return what `run` does, or a row without figures where `memory` GiB do not suffice."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), hard))
        return run(case, weights, cpu_seconds)
    except (MemoryError, RuntimeError) as error:  # torch says it by a RuntimeError
        said = any(words in str(error) for words in ("allocate memory", "bad_alloc"))
        if memory is None or not (said or isinstance(error, MemoryError)):
            raise
        return vars(case) | {"stopped": f"skipped: it needs more than {memory:g} GiB"}, [], {}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tensor_rows(case: Case, audit: AuditCase, found: Recovered, of: Client) -> list[dict]:
    """Return one row per recovered tensor: its certificate, RA-i and its true error."""
    x = normalise(of.true, SPEC)
    errors = true_errors(
        audit, found, Sealed(GroundTruth(x, of.y), None, False, None, SPEC.normalisation)
    )
    ranks = predictions(audit, found.layers)
    names = ("arch", "size", "batch", "seed", "index", "train_mode", "trained", "head", "noise")
    shared = {name: vars(case)[name] for name in (*names, "level", "classes_used")}
    return [
        shared
        | {name: value for name, value in vars(layer).items() if name != "used_by"}
        | {"ra": ranks.get(layer.name, ""), "true_error": errors.get(layer.name, "")}
        for layer in found.layers
    ]


def numbers(text: str) -> list[int]:
    """Read numbers of cases, such as 0,3."""
    return [int(part) for part in text.split(",")]


def chosen(part: str, only: Sequence[int] | None) -> list[tuple[int, Case]]:
    """Return the cases of a part with their numbers, all or only some.

    Raises SystemExit for a number that the part does not have.
    """
    cases = [*enumerate(CASES[part])]
    beyond = [number for number in only or () if not 0 <= number < len(cases)]
    if beyond:
        raise SystemExit(f"--only {beyond[0]}: part {part} has the cases 0 to {len(cases) - 1}")
    return cases if only is None else [cases[number] for number in only]


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack every case of a part, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=CASES)
    parser.add_argument("--rows", type=Path, help="folder for the raw rows")
    parser.add_argument("--images", type=Path, help="folder for a picture of every case")
    parser.add_argument("--weights", help="weights that benchmarks/train_network.py wrote")
    parser.add_argument("--only", type=numbers, help="numbers of the cases to run, such as 0,3")
    parser.add_argument("--list", action="store_true", help="print the part's cases and end")
    parser.add_argument(
        "--cpu-seconds", type=float, default=3600.0, help="when to end an attack (default 3600)"
    )
    parser.add_argument("--memory", type=float, help="GiB of addresses that the process may take")
    args = parser.parse_args(arguments)
    cases = chosen(args.part, args.only)
    if args.list:
        print(*(f"{number}: {case}" for number, case in cases), sep="\n")
        return
    weights = None if args.weights is None else load_plain(args.weights)
    shown = []
    names = ("arch", "size", "batch", "seed", "train_mode", "deepest", "psnr", "ssim", "identified")
    for number, case in cases:
        row, tensors, images = attempt(case, weights, args.cpu_seconds, args.memory)
        if args.rows:
            write(args.part, number, row, tensors, args.rows)
        if args.images and images:
            save_panels([*images.items()], args.images / f"{args.part}-{number}.png")
        shown.append([row.get(name, "") for name in (*names, "other_gradient_psnr", "cpu_seconds")])
        print(shown[-1], row["stopped"], flush=True)
    header = ["arch", "px", "B", "seed", "train mode", "deepest", "PSNR", "SSIM", "identified"]
    print(table([*header, "other gradient", "CPU s"], shown))


if __name__ == "__main__":
    main()
