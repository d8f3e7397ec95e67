"""Trains a network on public photographs, so that attacks on trained weights can be measured.

    python -m benchmarks.train_network --arch resnet18 --image-size 32 --output results/r18.pth
    python training.py --data-name photos -a resnet18 --image-size 32 --pretrained results/r18.pth

The class of a crop is the photograph that it is cut out of. No public photograph is ever a
client's image. The script prints the accuracy on fresh crops and writes the state dict.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn

from models.build import build_model
from train.datasets import DATASETS
from utils.image_files import PUBLIC_PHOTOS, random_crop
from utils.images import normalise
from utils.tensor_files import save

#: Of the two views of one scene only the first is a class.
CLASSES = [photo for number, photo in enumerate(PUBLIC_PHOTOS) if number != 1]
#: Pixels by which a stored crop is larger than the image cut out of it.
MARGIN = 8
#: Largest rate of SGD, and images per step.
RATE, BATCH = 0.05, 64


def crops(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut `count` crops per class: normalised images (N, 3, size, size) and labels (N,)."""
    draw = np.random.default_rng(seed)
    photos = [Image.fromarray(photo()).convert("RGB") for photo in CLASSES]
    images = [random_crop(photo, size, draw) for photo in photos for _ in range(count)]
    labels = torch.arange(len(photos)).repeat_interleave(count)
    return normalise(torch.stack(images), *DATASETS["photos"].normalisation), labels


def augmented(x: Tensor, size: int, generator: Generator) -> Tensor:
    """Return the images (B, 3, …) shifted, half mirrored, with other contrast and brightness."""
    row, column = torch.randint(x.shape[-1] - size + 1, (2,), generator=generator).tolist()
    x = x[..., row : row + size, column : column + size]
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(-1)
    contrast = 0.6 + 0.8 * torch.rand(len(x), 3, 1, 1, generator=generator)
    return x * contrast + 0.3 * torch.randn(len(x), 3, 1, 1, generator=generator)


def train(model: nn.Module, size: int, seconds: float, seed: int) -> int:
    """Train for that much processor time by SGD with a cosine rate; return the steps."""
    x, y = crops(150, size + MARGIN, seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(
        model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    model.train()
    start, steps = time.process_time(), 0
    while (progress := (time.process_time() - start) / seconds) < 1:
        optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * progress)) / 2 + 1e-4
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(augmented(x[chosen], size, generator)), y[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    return steps


def accuracy(model: nn.Module, size: int, seed: int) -> float:
    """Return the share of right classes in eval mode, on 16 crops per class of another seed."""
    x, y = crops(16, size, seed + 1)
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def main() -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet18", help="network")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--seconds", type=float, default=60, help="processor time of the training")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images")
    parser.add_argument("--output", required=True, help="file for the state dict")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    size = args.image_size
    model = build_model(args.arch, len(CLASSES), (3, size, size))
    before = accuracy(model, size, args.seed)
    steps = train(model, size, args.seconds, args.seed)
    after = accuracy(model, size, args.seed)
    print(f"{args.arch}, {size} px, {len(CLASSES)} classes: {steps} steps")
    print(f"accuracy on fresh crops: {before:.3f} before, {after:.3f} after")
    save(model.state_dict(), args.output)
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
