"""Measures the label methods on networks from untrained to converged, for docs/results.md.

    python -m benchmarks.labels --csv FILE --markdown FILE
    python -m benchmarks.labels --few-classes --seeds {0..14} --trials 1 --csv FILE

Settings T1 to T12 use ResNet-50 and a small ResNet: with random weights, with a new head, and at
three stages of training; with repeated and with uniform labels, noise, clipping and label
smoothing. The client's gradient of the head is computed in closed form, in float64, from the
features of one forward pass. The benchmark trains the small networks itself and keeps them in
--cache. A class is a photograph, a place in it, a scale and a permutation of its colours.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn
from torchvision.models.resnet import BasicBlock, resnet50

from inversion.labels.evidence import Auxiliary, Evidence, features_of
from inversion.labels.reconstruct import LABEL_FUNCTIONS
from inversion.settings import LABEL_METHODS
from models.build import SMALL_NETWORKS, build_model, find_head, init_head
from models.gradient import ClientLoss, batch_gradient
from train.datasets import DATASETS
from train.photos import PHOTOS
from utils.files import write_csv
from utils.image_files import crop, public_photographs
from utils.metrics import label_accuracy

SIZE, JITTER = 32, 6
SCALES = (1.0, 1.5, 2.0)
PERMUTATIONS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
STAGES = {"early": 0.08, "mid": 0.3, "converged": 1.0}
AUXILIARY_IMAGES = 50
PUBLIC_IMAGES = 128


# Data --------------------------------------------------------------------------------------


class Crops:
    """Classes cut out of the photographs, of which `draw` returns jittered, normalised samples."""

    def __init__(self, num_classes: int, seed: int = 0):
        photos = [Image.fromarray(photo()) for photo in PHOTOS.values()]
        rng = np.random.default_rng([seed, num_classes])
        side = SIZE + 2 * JITTER
        tiles = []
        for _ in range(num_classes):
            photo = photos[rng.integers(len(photos))]
            edge = side * SCALES[rng.integers(len(SCALES))]
            tile = crop(photo, (side, side), (edge, edge), rng.uniform(), rng.uniform())
            order = PERMUTATIONS[rng.integers(len(PERMUTATIONS))]
            tiles.append(tile[list(order)])
        self.tiles = torch.stack(tiles)

    def draw(self, labels: Tensor, generator: Generator) -> Tensor:
        """Return samples (N, 3, 32, 32) of the classes `labels` (N,).

        Place, flip, contrast, brightness and noise of each sample are random.
        """
        count = len(labels)

        def uniform(*shape):
            return torch.rand(*shape, generator=generator)

        rows, columns = (
            torch.randint(2 * JITTER + 1, (count, 1), generator=generator) + torch.arange(SIZE)
            for _ in range(2)
        )
        columns = torch.where(uniform(count, 1) < 0.5, columns.flip(1), columns)
        x = self.tiles[labels][
            torch.arange(count)[:, None, None, None],
            torch.arange(3)[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        contrast, brightness = (0.75 + 0.5 * uniform(count, 1, 1, 1) for _ in range(2))
        mean = x.mean((1, 2, 3), keepdim=True)
        x = ((x - mean) * contrast + mean) * brightness
        x = (x + 0.08 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        centre, scale = DATASETS["photos"].normalisation
        return (x - centre) / scale


def repeated_labels(batch_size: int, num_classes: int, distinct: int | None, generator: Generator):
    """Draw labels (B,).

    Without `distinct` they are uniform over the classes. Otherwise that many classes occur: each
    once, and the remaining labels in shares drawn uniformly from the simplex.
    """
    if distinct is None:
        return torch.randint(num_classes, (batch_size,), generator=generator)
    classes = torch.randperm(num_classes, generator=generator)[:distinct]
    shares = -torch.rand(distinct, generator=generator).log()
    rest = torch.multinomial(shares, batch_size - distinct, replacement=True, generator=generator)
    return torch.cat([classes, classes[rest]])


# Networks ----------------------------------------------------------------------------------


class SlimResNet(nn.Module):
    """A ResNet-10: a 3×3 stem and four BasicBlocks of widths 16, 32, 64 and 128."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        before = 16
        for width in (16, 32, 64, 128):
            stride = 1 if width == 16 else 2
            down = None
            if width != before or stride != 1:
                down = nn.Sequential(
                    nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
                )
            layers.append(BasicBlock(before, width, stride, down))
            before = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(before, num_classes)

    def forward(self, x):
        """Return the logits (B, classes) of images (B, 3, 32, 32)."""
        return self.fc(self.body(x))


def train_stages(num_classes: int, seed: int, steps: int, cache: Path) -> dict[str, SlimResNet]:
    """Return the network early, in the middle and at the end of its training, by stage.

    It is read from `cache` if it is there, and otherwise trained and written to it.
    """
    file = cache / f"slim_{num_classes}_{seed}_{steps}.pth"
    if file.exists():
        states = torch.load(file, weights_only=True)
    else:
        cache.mkdir(parents=True, exist_ok=True)
        states = _train(num_classes, seed, steps)
        torch.save(states, file)
    models = {}
    for stage, state in states.items():
        models[stage] = SlimResNet(num_classes)
        models[stage].load_state_dict(state)
    return models


def _train(num_classes, seed, steps):
    torch.manual_seed(seed)
    model, crops = SlimResNet(num_classes), Crops(num_classes)
    generator = Generator().manual_seed(1000 + seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.2, total_steps=steps)
    wanted = {round(share * steps): stage for stage, share in STAGES.items()}
    states = {}
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        y = torch.randint(num_classes, (64,), generator=generator)
        loss = F.cross_entropy(model(crops.draw(y, generator)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step in wanted:
            states[wanted[step]] = {k: v.clone() for k, v in model.state_dict().items()}
            y = torch.randint(num_classes, (1000,), generator=generator)
            with torch.no_grad():
                found = model.eval()(crops.draw(y, generator)).argmax(1)
            model.train()
            print(
                f"{num_classes} classes, seed {seed}, step {step}: validation accuracy "
                f"{100 * (found == y).float().mean():.1f} %, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    return states


# Settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One row of the table: a network, a batch, and what the client does to its gradient."""

    #: Its short name, such as T2a.
    name: str
    #: Its description in the table.
    title: str
    #: "resnet50", a name in SMALL_NETWORKS, or a SlimResNet: "random", "fresh" (trained, with a new
    #: head) or a stage in STAGES.
    network: str
    num_classes: int
    #: Whether BatchNorm uses the batch's statistics.
    train_mode: bool
    #: Number of classes in the batch; None for labels that are uniform over all classes.
    distinct: int | None
    #: Method → least mean accuracy in %.
    reach: dict[str, float]
    batch_size: int = 256
    #: Whether the head has a bias.
    has_bias: bool = True
    #: Standard deviation of the noise that is added to every entry of the gradient.
    sigma: float = 0.0
    #: Norm to which the gradient is clipped, or None.
    clip: float | None = None
    label_smoothing: float = 0.0


SETTINGS = (
    Setting("T1", "ResNet-50 random, train mode", "resnet50", 1000, True, 10, {"counts": 99.5}),
    Setting("T2a", "the same", "resnet50", 1000, True, None, {"counts": 99.5}),
    Setting("T2b", "the same", "resnet50", 1000, True, 128, {"counts": 99.5}),
    Setting("T3", "the same", "resnet50", 10, True, 10, {"counts": 97.5}),
    Setting(
        "T4a", "T1 without bias", "resnet50", 1000, True, None, {"counts": 99.5}, has_bias=False
    ),
    Setting("T4b", "T1 without bias", "resnet50", 1000, True, 10, {"counts": 98}, has_bias=False),
    Setting("T5", "SlimResNet random, eval mode", "random", 10, False, 10, {"counts": 99}),
    Setting("T6", "the same", "random", 10, False, None, {"counts": 95}),
    Setting("T7", "trained trunk, fresh head", "fresh", 1000, False, 10, {"counts": 99.5}),
    Setting(
        "T8", "early in training, eval mode", "early", 100, False, 10,
        {"counts": 84, "counts-aux": 94},
    ),
    Setting(
        "T9", "converged, eval mode", "converged", 100, False, 10,
        {"counts": 58, "counts-aux": 60, "counts-bn": 85},
    ),
    Setting(
        "T10", "converged, eval mode", "converged", 10, False, 10,
        {"counts": 60, "counts-bn": 95},
    ),
    Setting(
        "T11a", "SlimResNet random, train mode, noise 1e-3", "random", 100, True, 6, {"counts": 98},
        batch_size=64, sigma=1e-3,
    ),
    Setting(
        "T11b", "SlimResNet random, train mode, clipped to 0.5", "random", 100, True, 6,
        {"counts": 97}, batch_size=64, clip=0.5,
    ),
    Setting(
        "T12", "SlimResNet random, train mode, label smoothing 0.1", "random", 100, True, 10,
        {"counts": 98.5}, label_smoothing=0.1,
    ),
)  # fmt: skip


#: `--few-classes`: untrained networks with few classes.
FEW_CLASSES = tuple(
    Setting(
        f"F{number}{'a' if train_mode else 'b'}",
        f"{title} random, {'train' if train_mode else 'eval'} mode",
        network, 3, train_mode, None, {}, batch_size=batch_size,
    )
    for number, (network, title, batch_size) in enumerate(
        (("lenet", "LeNet", 24), ("convnet", "convnet", 24), ("random", "SlimResNet", 24),
         ("lenet", "LeNet", 32), ("convnet", "convnet", 32), ("random", "SlimResNet", 32)), 1
    )
    for train_mode in (True, False)
    if train_mode or network != "lenet"
)  # fmt: skip


def network_of(setting: Setting, seed: int, steps: dict[int, int], cache: Path) -> nn.Module:
    """Return the attacked network of a setting, with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    if setting.network == "resnet50":
        model = resnet50(num_classes=setting.num_classes)
        init_head(model, "normal")
    elif setting.network in SMALL_NETWORKS:
        model = build_model(setting.network, setting.num_classes, (3, SIZE, SIZE))
    elif setting.network == "random":
        model = SlimResNet(setting.num_classes)
    elif setting.network == "fresh":
        model = train_stages(100, seed, steps[100], cache)["converged"]
        torch.manual_seed(seed)
        model.fc = nn.Linear(model.fc.in_features, setting.num_classes)
        init_head(model, "normal")
    else:
        count = setting.num_classes
        model = train_stages(count, seed, steps[count], cache)[setting.network]
    if not setting.has_bias:
        find_head(model)[1].bias = None
    return model


def client_step(setting: Setting, model, x, y, generator) -> tuple[Evidence, Tensor | None]:
    """Return the evidence in the head's gradient of batch (x, y), and the last BN layer's mean.

    The mean is that of the inputs of the layer, None if the network has no BatchNorm.
    """
    features, bn_inputs = features_of(model, x, setting.train_mode)
    _, head = find_head(model)
    weight = head.weight.detach().double()
    bias = torch.zeros(len(weight)).double() if head.bias is None else head.bias.detach().double()
    eps = setting.label_smoothing
    residual = (features @ weight.T + bias).softmax(1) - eps / setting.num_classes
    residual[torch.arange(len(y)), y] -= 1 - eps
    factor = 1.0
    if setting.clip is not None:
        whole = batch_gradient(model, x, y, ClientLoss(setting.train_mode, eps))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in whole))
        factor = min(1.0, setting.clip / norm)

    def sent(g):
        noise = torch.randn(g.shape, generator=generator, dtype=torch.float64)
        return factor * g + setting.sigma * noise

    evidence = Evidence(
        weight_grad=sent(residual.T @ features / len(y)),
        bias_grad=sent(residual.mean(0)) if setting.has_bias else None,
        weight=weight,
        bias=bias,
        batch_size=len(y),
        label_smoothing=eps,
        sigma=setting.sigma,
        clipped=factor < 1,
        resolution=torch.finfo(torch.float64).eps,
    )
    return evidence, None if bn_inputs is None else bn_inputs.mean(0)


def run(
    setting: Setting,
    seed: int,
    trials: int,
    steps: dict[int, int],
    cache: Path,
    methods: Sequence[str] = tuple(LABEL_FUNCTIONS),
) -> list[dict]:
    """Return the rows of `methods` on `trials` batches of one setting and one network."""
    model = network_of(setting, seed, steps, cache)
    crops = Crops(setting.num_classes)
    centre, scale = DATASETS["photos"].normalisation
    photos = (public_photographs(PUBLIC_IMAGES, (3, SIZE, SIZE)) - centre) / scale
    public, _ = features_of(model, photos, setting.train_mode)
    auxiliary = None
    if setting.network in STAGES:
        labels = torch.arange(setting.num_classes).repeat(AUXILIARY_IMAGES)
        images = crops.draw(labels, Generator().manual_seed(7))
        features, bn_inputs = features_of(model, images, setting.train_mode)
        auxiliary = Auxiliary(features, labels, bn_inputs)
    rows = []
    for trial in range(trials):
        generator = Generator().manual_seed(100_000 + 1000 * seed + trial)
        y = repeated_labels(setting.batch_size, setting.num_classes, setting.distinct, generator)
        x = crops.draw(y, generator)
        evidence, bn_mean = client_step(setting, model, x, y, generator)
        evidence = replace(evidence, public=public)
        true = torch.bincount(y, minlength=setting.num_classes)
        for name in methods:
            seen = evidence
            needs = LABEL_METHODS[name]
            if needs.needs_auxiliary:
                if auxiliary is None:
                    continue
                own = replace(auxiliary, bn_inputs=None)
                if needs.needs_uploaded_bn:
                    own = replace(auxiliary, bn_mean=bn_mean)
                seen = replace(evidence, auxiliary=own)
            begin = time.perf_counter()
            estimate = LABEL_FUNCTIONS[name](seen)
            seconds = time.perf_counter() - begin
            found = torch.repeat_interleave(torch.arange(len(true)), estimate.counts)
            occurring = true > 0
            rows.append(
                {
                    "setting": setting.name,
                    "seed": seed,
                    "trial": trial,
                    "method": name,
                    "regime": estimate.regime or "",
                    "accuracy": round(100 * label_accuracy(found, y), 3),
                    "classes found": int(((estimate.counts > 0) & occurring).sum()),
                    "classes wrong": int(((estimate.counts > 0) & ~occurring).sum()),
                    "distinct": int(occurring.sum()),
                    "repetition, 1 - U/B": round(100 - 100 * occurring.sum().item() / len(y), 2),
                    "repetition, shared": round(100 * true[true > 1].sum().item() / len(y), 2),
                    "seconds": round(seconds, 4),
                }
            )
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the table settings × methods of mean accuracies in %."""
    lines = [
        f"| id | setting | classes | B | U | 1 − U/B, shared | seed | "
        f"{' | '.join(LABEL_FUNCTIONS)} | reach |",
        f"| {' | '.join(['---'] * (8 + len(LABEL_FUNCTIONS)))} |",
    ]
    for setting in (*SETTINGS, *FEW_CLASSES):
        own = [row for row in rows if row["setting"] == setting.name]
        for seed in sorted({row["seed"] for row in own}):
            here = [row for row in own if row["seed"] == seed]
            cells = []
            for method in LABEL_FUNCTIONS:
                values = [row["accuracy"] for row in here if row["method"] == method]
                short = values and np.mean(values) < setting.reach.get(method, 0)
                cells.append(f"{np.mean(values):.1f}{' (!)' if short else ''}" if values else "")
            rates = (np.mean([r[f"repetition, {k}"] for r in here]) for k in ("1 - U/B", "shared"))
            reach = ", ".join(f"{k} {v:g}" for k, v in setting.reach.items())
            lines.append(
                f"| {setting.name} | {setting.title} | {setting.num_classes} | "
                f"{setting.batch_size} | {setting.distinct or 'uniform'} | "
                f"{', '.join(f'{rate:.1f} %' for rate in rates)} | {seed} | "
                f"{' | '.join(cells)} | {reach} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", nargs="+", help="measure only these settings, such as T1 T2a")
    parser.add_argument(
        "--few-classes",
        action="store_true",
        help="measure FEW_CLASSES, not T1 to T12",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the networks")
    parser.add_argument("--trials", type=int, default=10, help="batches per network")
    parser.add_argument("--steps-10", type=int, default=600, help="training steps, 10 classes")
    parser.add_argument("--steps-100", type=int, default=2500, help="training steps, 100 classes")
    parser.add_argument("--cache", type=Path, default=Path("results/label-networks"))
    parser.add_argument("--csv", help="file for the rows")
    parser.add_argument("--markdown", help="file for the table")
    args = parser.parse_args()
    steps = {10: args.steps_10, 100: args.steps_100}
    rows = []
    for setting in FEW_CLASSES if args.few_classes else SETTINGS:
        if args.settings and setting.name not in args.settings:
            continue
        for seed in args.seeds:
            found = run(setting, seed, args.trials, steps, args.cache)
            rows += found
            print(setting.name, setting.title, f"seed {seed}:", flush=True)
            for method in LABEL_FUNCTIONS:
                mine = [row for row in found if row["method"] == method]
                if mine:
                    accuracy, seconds = (
                        np.mean([row[key] for row in mine]) for key in ("accuracy", "seconds")
                    )
                    regimes = ", ".join(sorted({row["regime"] for row in mine}))
                    print(f"  {method:15} {accuracy:5.1f} %  {seconds:7.3f} s  {regimes}")
    if args.csv:
        write_csv(list(rows[0]), [list(row.values()) for row in rows], args.csv)
    if args.markdown:
        Path(args.markdown).write_text(markdown(rows))


if __name__ == "__main__":
    main()
