"""What may be asked of a data set, without torch: a wrong request is refused before its import."""

from dataclasses import dataclass

from utils.errors import InputError

#: `--data-name`: names in DATASETS (train/datasets.py).
DATASET_NAMES = ("imagenet", "cifar100", "svhn", "celeba", "photos", "folder")
#: Class i of `photos` is the i-th of these photographs (train/photos.py).
PHOTO_NAMES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "china",
)


@dataclass(frozen=True)
class Request:
    """What the user asks of a data set."""

    #: Folder with its files.
    root: str | None = None
    #: Side of the square images in pixels, or (H, W); None for the data set's own.
    size: int | tuple[int, int] | None = None
    #: Channels of the images, 1 or 3, for `folder` and `photos`; None for their own.
    channels: int | None = None
    #: Bits per grey value in files of more than 8 bits that do not say it; None for 16.
    bit_depth: int | None = None
    #: Number of distinct labels in a batch, for `photos`; None for free labels.
    distinct_labels: int | None = None
    #: Seed that draws the order of the images.
    seed: int = 0
    #: Threads that decode images.
    workers: int = 4
    #: The client's loss, a name in LOSS_KINDS: it says what labels are (train/label_vectors.py).
    loss: str = "cross-entropy"
    #: CSV file with the label vectors of the images below `root`; None for class folders.
    labels_csv: str | None = None
    #: Mean and standard deviation of the normalisation, one number per channel; None for the set's.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    #: Outputs of an imported network, at least the classes of the data set; None for those.
    num_classes: int | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Return (H, W) of the images, None for the data set's own."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def check_name(name: str) -> None:
    """Raise InputError unless `name` is that of a data set."""
    if name not in DATASET_NAMES:
        raise InputError(f"--data-name {name}: unknown; choose from {', '.join(DATASET_NAMES)}")


def check_request(name: str, request: Request) -> None:
    """Raise InputError for what data set `name` does not have, whatever its files hold."""
    check_name(name)
    if request.distinct_labels is not None and name != "photos":
        raise InputError(
            f"--distinct-labels {request.distinct_labels}: only for --data-name photos; leave it "
            "out"
        )
    if request.channels is not None and name not in ("folder", "photos"):
        raise InputError(
            f"--channels {request.channels}: only for --data-name folder and photos; leave it out"
        )
    if request.bit_depth is not None and name not in ("folder", "imagenet", "celeba"):
        raise InputError(
            f"--bit-depth {request.bit_depth}: only for data sets of image files; leave it out"
        )
    _check_labels_csv(name, request)


def _check_labels_csv(name: str, request: Request) -> None:
    if request.labels_csv is None:
        return
    if name != "folder":
        raise InputError(
            f"--labels-csv {request.labels_csv}: only for --data-name folder; leave it out"
        )
    if request.loss != "bce":
        raise InputError(
            f"--labels-csv {request.labels_csv}: holds one number per class, which --loss bce "
            "takes; give it as well"
        )


def check_openable(name: str, request: Request) -> None:
    """Raise InputError where data set `name` cannot be opened with such a request."""
    check_request(name, request)
    if name != "photos":
        if request.root is None:
            raise InputError(
                f"--data: missing; --data-name {name} needs the folder of the data set"
            )
        return
    if request.root is not None:
        raise InputError(f"--data {request.root}: photos are built in; leave --data out")
    distinct, count = request.distinct_labels, len(PHOTO_NAMES)
    if distinct is not None and not 1 <= distinct <= count:
        raise InputError(
            f"--distinct-labels {distinct}: photos has {count} classes; give 1 to {count}"
        )


def check_batch_size(request: Request, batch_size: int) -> None:
    """Raise InputError where a batch has too few images for the labels asked for."""
    distinct = request.distinct_labels
    if distinct is not None and distinct > batch_size:
        raise InputError(
            f"--distinct-labels {distinct}: more than the {batch_size} images of the batch"
        )
