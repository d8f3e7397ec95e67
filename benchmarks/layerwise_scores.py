"""Measures how deep a layerwise attack came, and whether its images are told from decoys."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from inversion.audit.identification import identify, similarities
from inversion.layerwise.attack import NEAR, Recovered
from inversion.layerwise.kinds import WEIGHTED
from models.graph import operation_name, traced_tensors
from train.batches import DECOYS
from train.photos import PHOTOS
from utils import metrics
from utils.image_files import random_crop

#: Number of the batch of `photos` that decoys are drawn from; no case has it.
DECOY_BATCH = 1000
#: How an attack makes images of tensors that are certified.
CERTIFIED = ("solved", "stem", "activations", "decoded")


@dataclass(frozen=True)
class Decoys:
    """Holds crops that are in no client's batch and none of the attacker's public photographs."""

    #: (B, N, C, H, W) of uint8, per image crops of the other photographs of `photos`.
    others: Tensor
    #: (B, N, C, H, W) of uint8, per image crops of its own photograph, harder to tell apart.
    same: Tensor


def decoys(y: Tensor, size: int, seed: int, count: int = DECOYS) -> Decoys:
    """Cut `count` decoys of both kinds for every image of labels y (B,), `size` pixels a side.

    They are drawn as the batches of `photos` are, which tests no attacker's gain exactly where the
    batch has the number 0: its images are centre crops. Images of one label share their decoys.
    """
    photos = [Image.fromarray(read()) for read in PHOTOS.values()]
    rows: dict[str, dict[int, Tensor]] = {"others": {}, "same": {}}
    for label in set(y.tolist()):
        crops: dict[str, list[Tensor]] = {"others": [], "same": []}
        for number in range(count):
            draw = np.random.default_rng([seed, DECOY_BATCH, label, number])
            other = (label + int(draw.integers(1, len(photos)))) % len(photos)
            crops["others"].append(random_crop(photos[other], size, draw))
            crops["same"].append(random_crop(photos[label], size, draw))
        for kind, images in crops.items():
            rows[kind][label] = (torch.stack(images) * 255).round().byte()
    chosen = {kind: torch.stack([found[i] for i in y.tolist()]) for kind, found in rows.items()}
    return Decoys(chosen["others"], chosen["same"])


def ranks(found: Tensor, y_found: Tensor, true: Tensor, y: Tensor, against: Tensor) -> list[int]:
    """Return the rank of every true image among itself and its decoys, by SSIM; 1 is the best.

    found, true: (B, C, H, W) in [0, 1], of the labels y_found and y, (B,) each. against:
    (B, N, C, H, W) of uint8. Candidates are compared with the nearest reconstruction of their label
    (`similarities`), so that no pairing favours the truth; ties count against it.
    """
    rounded = (true * 255).round() / 255  # as decoys are stored: rounding tells none apart
    scores = similarities(metrics.ssim, found.cpu().float(), y_found.cpu(), rounded, y, against)
    return identify(scores).ranks


def identification(
    prefix: str, found: Tensor, y_found: Tensor, true: Tensor, y: Tensor, among: Decoys
) -> dict:
    """Return the columns that say which images are identified: their numbers and the ranks."""
    row: dict[str, int | str] = {}
    for name, against in (("identified", among.others), ("identified_same", among.same)):
        places = ranks(found, y_found, true, y, against)
        row[f"{prefix}{name}"] = places.count(1)
        row[f"{prefix}{name}_ranks"] = " ".join(map(str, places))
    return row


def depth(model: nn.Module, found: Recovered, image_shape: tuple[int, int, int]) -> dict:
    """Return the columns that say how far the walk came.

    source: the deepest certified tensor; depth: its place among the depth_of tensors that
    convolutions and linear layers take, from the head's features, 1, to the image; 0 for none.
    share: its numbers per image over the image's. pixels: see `pixels`.
    """
    source = found.sources[0] if found.sources and found.method in CERTIFIED else ""
    nodes = traced_tensors(model, 1, image_shape)
    taken = {node for user in nodes if operation_name(user) in WEIGHTED
             for node in user.meta["inputs"]}  # fmt: skip
    names = [node.name for node in nodes]
    places = [number for number, node in enumerate(nodes) if node in taken]
    came = sum(place >= names.index(source) for place in places) if source else 0
    numbers = found.tensors[source][0].numel() if source in found.tensors else 0
    if found.method == "solved":
        numbers = found.images[0].numel()
    return {
        "source": source, "depth": came, "depth_of": len(places),
        "share": numbers / found.images[0].numel(), "pixels": pixels(found),
    }  # fmt: skip


def pixels(found: Recovered) -> float:
    """Return the share of the batch's pixels that the attack may call determined by the gradient.

    1 where the image was solved for and certified. Behind a pooling that was solved for, the share
    of images whose own pooled values reproduce these up to NEAR, if the pooled values are at least
    as many as the pixels: counted and checked as `Recovered.determined` does, but no pixel has a
    certificate of its own. Else 0: matched and decoded images are estimates.
    """
    if found.method == "solved":
        return 1.0
    if found.method != "stem" or found.residual is None:
        return 0.0
    enough = found.tensors[found.sources[0]][0].numel() >= found.images[0].numel()
    return (found.residual <= NEAR).double().mean().item() if enough else 0.0


def labels(found: Recovered, given: Tensor, true: Tensor) -> dict:
    """Return the columns about labels: how many the batch has, whether they were read, and right.

    given, true: (B,). labels_right counts the labels of the batch that are among those which the
    walk read from the gradient, or, where it read none, among those given.
    """
    read = found.labels is not None
    attacked = found.labels if found.labels is not None else given
    right = Counter(attacked.tolist()) & Counter(true.tolist())
    return {
        "labels": len(set(true.tolist())), "labels_read": read, "labels_right": right.total(),
    }  # fmt: skip
