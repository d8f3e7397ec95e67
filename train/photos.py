"""The photographs inside scikit-image and scikit-learn, out of which data set `photos` is cut."""

from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.request import PHOTO_NAMES
from utils.image_files import (
    centre_crop,
    random_crop,
    scikit_image_photograph,
    scikit_learn_photograph,
)

#: Class i of `photos` is the i-th: name → function that returns the pixels (H, W, 3) of uint8.
PHOTOS = {
    name: partial(scikit_learn_photograph, "china.jpg")
    if name == "china"
    else partial(scikit_image_photograph, name)
    for name in PHOTO_NAMES
}


def photo_batch(
    batch_size: int,
    target_idx: int,
    size: int | tuple[int, int],
    *,
    seed: int,
    distinct_labels: int | None = None,
    channels: int = 3,
) -> tuple[Tensor, Tensor]:
    """Cut batch `target_idx` out of the photographs: x (B, channels, H, W) in [0, 1], y (B,).

    size: the side of square images, or (H, W). channels: 3, or 1 for grey ones.

    Batch 0 with B ≤ 8 and free labels: centre crops of the first B photographs, in the order
    of PHOTOS. Every other batch: position p is a crop drawn from (seed, target_idx, p) with a
    side of 50 to 100 % of the photograph's shorter one and real-valued corners, so that no
    crop comes twice; its photograph, which is its class, is drawn too. With `distinct_labels`
    U the labels are U classes that (seed, target_idx) draws, repeated in turn.
    """
    names = list(PHOTOS)
    photos = {}

    def photo(label):
        if label not in photos:
            photo = Image.fromarray(PHOTOS[names[label]]())
            photos[label] = photo.convert("L") if channels == 1 else photo
        return photos[label]

    if target_idx == 0 and batch_size <= len(names) and distinct_labels is None:
        labels = list(range(batch_size))
        images = [centre_crop(photo(label), size) for label in labels]
        return torch.stack(images), torch.tensor(labels)
    classes = None
    if distinct_labels is not None:
        draw = np.random.default_rng([seed, target_idx])
        classes = draw.permutation(len(names))[:distinct_labels].tolist()
    labels, crops = [], []
    for position in range(batch_size):
        draw = np.random.default_rng([seed, target_idx, position])
        label = int(draw.integers(len(names)))
        if classes is not None:
            label = classes[position % len(classes)]
        labels.append(label)
        crops.append(random_crop(photo(label), size, draw))
    return torch.stack(crops), torch.tensor(labels)
