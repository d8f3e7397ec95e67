"""Data sets, on small files in the published formats that the tests write."""

import pickle
from collections import Counter

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from tests.support import Hostile, succeed
from train.batches import load_backup, load_backup_control, load_batch, load_control
from train.datasets import DATASETS, dataset_spec, normalise
from train.photos import PHOTOS, photo_batch
from train.request import Request
from utils import image_files
from utils.errors import InputError


def write_images(folder, count, size=(40, 30), mode="RGB", ending="png", seed=0):
    """Random images; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng([seed, len(mode)])
    paths = []
    for i in range(count):
        shape = size[::-1] if mode == "L" else (*size[::-1], 3)
        path = folder / f"{i:03d}.{ending}"
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


def image_folder(root, classes=("cat", "dog", "owl"), count=4, **options):
    for i, name in enumerate(classes):
        write_images(root / name, count, seed=i, **options)
    return root


def test_photos_first_batch_is_the_photographs_in_order():
    x, y = photo_batch(8, 0, 48, seed=0)
    assert x.shape == (8, 3, 48, 48)
    assert y.tolist() == list(range(8))
    for image, reader in zip(x, PHOTOS.values(), strict=True):
        photo = Image.fromarray(reader())
        side = min(photo.size)
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        centre = photo.crop((left, top, left + side, top + side)).resize((48, 48))
        assert np.abs(np.asarray(centre) / 255 - image.permute(1, 2, 0).numpy()).mean() < 0.02
    assert torch.equal(photo_batch(3, 0, 48, seed=7)[0], x[:3])


def test_photo_crops_follow_seed_index_and_position():
    x, y = photo_batch(20, 3, 16, seed=5)
    again = photo_batch(24, 3, 16, seed=5)
    assert torch.equal(again[0][:20], x)
    assert torch.equal(again[1][:20], y)
    for seed, index in ((5, 4), (6, 3)):
        assert not torch.equal(photo_batch(20, index, 16, seed=seed)[0], x)
    many = torch.cat([photo_batch(64, index, 16, seed=5)[0] for index in range(1, 5)])
    assert len({image.numpy().tobytes() for image in many}) == len(many)
    assert photo_batch(9, 0, 16, seed=0)[1].tolist() != list(range(9))


def test_distinct_labels():
    for index in (0, 2):
        _, y = photo_batch(10, index, 8, seed=0, distinct_labels=3)
        assert sorted(Counter(y.tolist()).values()) == [3, 3, 4]
    x, y, _ = load_batch("photos", Request(size=8, distinct_labels=1), 4, 0)
    assert len(set(y.tolist())) == 1
    assert len({image.numpy().tobytes() for image in x}) == 4


def test_normalisation():
    spec = DATASETS["photos"]
    x, _, _ = load_batch("photos", Request(size=8), 8, 0)
    raw = photo_batch(8, 0, 8, seed=0)[0]
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))
    torch.testing.assert_close(x * std + mean, raw)


def test_folder_batches_are_disjoint_and_decoded_alone(tmp_path, monkeypatch):
    root = image_folder(tmp_path)
    decoded = []
    real = image_files.read_picture
    monkeypatch.setattr(
        image_files, "read_picture", lambda p, *a: (decoded.append(p), real(p, *a))[1]
    )
    request = Request(root=str(root), size=16, seed=3, workers=1)
    batches = [load_batch("folder", request, 5, index) for index in range(2)]
    assert len(decoded) == 10
    assert len(set(decoded)) == 10
    x, y, spec = batches[0]
    assert x.shape == (5, 3, 16, 16)
    assert spec.num_classes == 3
    for path, label in zip(decoded[:5], y.tolist(), strict=True):
        assert ("cat", "dog", "owl").index(path.split("/")[-2]) == label
    other = load_batch("folder", Request(root=str(root), size=16, seed=4), 5, 0)
    assert not torch.equal(other[0], x)
    with pytest.raises(InputError, match="12 images make 2 batches of 5; give 0 to 1"):
        load_batch("folder", request, 5, 2)
    with pytest.raises(InputError, match="--batch-size 13: folder holds 12 images"):
        load_batch("folder", request, 13, 0)


def test_grey_folder(tmp_path):
    root = image_folder(tmp_path / "grey", mode="L")
    x, _, spec = load_batch("folder", Request(root=str(root), size=16), 4, 0)
    assert x.shape == (4, 1, 16, 16)
    assert len(spec.mean) == len(spec.std) == 1
    x, _, spec = load_batch("folder", Request(root=str(root), size=16, channels=3), 4, 0)
    assert x.shape == (4, 3, 16, 16)
    raw = x * torch.tensor(spec.std).view(-1, 1, 1) + torch.tensor(spec.mean).view(-1, 1, 1)
    torch.testing.assert_close(raw[:, 0], raw[:, 2])
    write_images(root / "owl", 5)  # colour images overwrite the grey ones of one class
    write_images(root / "owl", 1, mode="L")
    with pytest.raises(InputError, match="is in colour, among grey ones; give --channels 3"):
        load_batch("folder", Request(root=str(root), size=16), 13, 0)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_grey_images_keep_their_range(tmp_path, dtype):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(dtype)
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / "x.tif")
    pixels = image_files.decode(str(tmp_path / "a" / "x.tif"), 1, 64)
    torch.testing.assert_close(pixels[0], torch.from_numpy(values / 65535).float())


def test_values_out_of_range_are_refused(tmp_path):
    Image.fromarray(np.full((9, 9), 200.0, dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="holds 200 to 200, but images of kind F"):
        image_files.decode(str(tmp_path / "x.tif"), 1, 9)


def test_huge_images_are_refused_not_decoded(tmp_path, monkeypatch):
    write_images(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"000\.png is no readable image .*pixels"):
        image_files.decode(str(tmp_path / "000.png"), 3, 8)


def test_decode_scales_the_shorter_side_and_cuts_the_centre(tmp_path):
    values = np.zeros((20, 60, 3), dtype=np.uint8)
    values[:, 20:40] = 255
    Image.fromarray(values).save(tmp_path / "x.png")
    assert (image_files.decode(str(tmp_path / "x.png"), 3, 20) == 1).all()


def test_broken_images_are_named(tmp_path):
    root = image_folder(tmp_path, count=2)
    broken = root / "dog" / "001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(InputError, match=r"dog/001\.png is no readable image"):
        load_batch("folder", Request(root=str(root), size=8), 6, 0)
    (root / "cat" / "000.png").write_text("no image")
    with pytest.raises(InputError, match=r"cat/000\.png is no readable image"):
        load_batch("folder", Request(root=str(root), size=8), 1, 0)


def test_folders_without_images(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_batch("folder", Request(root=str(tmp_path / "none")), 1, 0)
    with pytest.raises(InputError, match="one subfolder per class"):
        load_batch("folder", Request(root=str(tmp_path)), 1, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="one subfolder per class"):
        load_batch("folder", Request(root=str(tmp_path)), 1, 0)
    with pytest.raises(InputError, match="--data: missing"):
        load_batch("imagenet", Request(), 1, 0)


@pytest.mark.parametrize("inner", ["train", "."])
def test_imagenet(tmp_path, inner):
    image_folder(tmp_path / inner)
    x, y, spec = load_batch("imagenet", Request(root=str(tmp_path)), 2, 0)
    assert x.shape == (2, 3, 224, 224)
    assert spec.num_classes == 1000
    assert set(y.tolist()) <= {0, 1, 2}


def celeba_folder(root, count=6):
    """x_train/ and y_train.txt with identities from 1."""
    paths = write_images(root / "x_train", count, size=(30, 40), ending="jpg")
    lines = [f"{path.name} {10177 - i}" for i, path in enumerate(paths)]
    (root / "y_train.txt").write_text("\n".join(lines) + "\n")
    return root


def test_celeba(tmp_path):
    x, y, spec = load_batch("celeba", Request(root=str(celeba_folder(tmp_path)), size=32), 6, 0)
    assert x.shape == (6, 3, 32, 32)
    assert spec.num_classes == 10177
    assert sorted(y.tolist()) == list(range(10171, 10177))
    (tmp_path / "y_train.txt").write_text("000.jpg 1\n001.jpg 10178\n")
    with pytest.raises(InputError, match="line 2 is not 'name identity'"):
        load_batch("celeba", Request(root=str(tmp_path)), 1, 0)
    (tmp_path / "y_train.txt").unlink()
    with pytest.raises(InputError, match=r"x_train and a file y_train\.txt"):
        load_batch("celeba", Request(root=str(tmp_path)), 1, 0)


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    content = {"data": data, "fine_labels": list(range(90, 100)), "coarse_labels": [0] * 10}
    (folder / "train").write_bytes(pickle.dumps(content))
    x, y, spec = load_batch("cifar100", Request(root=str(tmp_path)), 10, 0)
    assert sorted(y.tolist()) == list(range(90, 100))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))
    raw = ((x * std + mean) * 255).round().byte().flatten(1).numpy()
    assert (raw == data[y.numpy() - 90]).all()
    (folder / "train").write_bytes(pickle.dumps({**content, "data": Hostile(tmp_path / "ran")}))
    with pytest.raises(InputError, match="it holds posix.system"):
        load_batch("cifar100", Request(root=str(tmp_path)), 1, 0)
    assert not (tmp_path / "ran").exists()
    (folder / "train").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cifar-100-python/train"):
        load_batch("cifar100", Request(root=str(tmp_path)), 1, 0)


def test_svhn(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    labels = np.arange(1, 11, dtype=np.uint8)[:, None]  # the file calls digit 0 "10"
    scipy.io.savemat(tmp_path / "train_32x32.mat", {"X": data, "y": labels})
    x, y, spec = load_batch("svhn", Request(root=str(tmp_path), size=32), 10, 0)
    assert sorted(y.tolist()) == list(range(10))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))
    zero = ((x[y.tolist().index(0)] * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()
    assert (zero == data[..., 9]).all()
    assert load_batch("svhn", Request(root=str(tmp_path), size=64), 2, 0)[0].shape[-1] == 64
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"train_32x32\.mat"):
        load_batch("svhn", Request(root=str(tmp_path / "empty")), 1, 0)


def test_backup(tmp_path):
    x, y = torch.randn(10, 3, 12, 12), torch.arange(10)
    torch.save(x, tmp_path / "x_true.pth.bk")
    torch.save(y, tmp_path / "y_true.pth.bk")
    got_x, got_y, spec = load_backup(str(tmp_path), "cifar100", 4, 1)
    assert torch.equal(got_x, x[4:8])
    assert torch.equal(got_y, y[4:8])
    assert spec.shape == (3, 12, 12)
    with pytest.raises(InputError, match="beyond the 10 images"):
        load_backup(str(tmp_path), "cifar100", 4, 2)
    with pytest.raises(InputError, match="classes 0 to 7"):
        load_backup(str(tmp_path), "photos", 10, 0)
    with pytest.raises(InputError, match="class count comes from its files"):
        load_backup(str(tmp_path), "folder", 4, 0)
    for bad_x, bad_y in ((x.byte(), y), (x, y / 2), (x, y[0]), (x, y[:3])):
        torch.save(bad_x, tmp_path / "x_true.pth.bk")
        torch.save(bad_y, tmp_path / "y_true.pth.bk")
        with pytest.raises(InputError, match="must be normalised floats"):
            load_backup(str(tmp_path), "cifar100", 4, 0)
    torch.save(y[:, None], tmp_path / "y_true.pth.bk")
    torch.save(x[:, :1], tmp_path / "x_true.pth.bk")
    with pytest.raises(InputError, match="1 channels"):
        load_backup(str(tmp_path), "cifar100", 4, 0)


def test_unknown_names_list_the_choices():
    with pytest.raises(InputError, match="--data-name mnist: unknown; choose from imagenet, cifar"):
        load_batch("mnist", Request(), 1, 0)


# Other images with the same labels ----------------------------------------------------------


def rows_of(x):
    return {image.numpy().tobytes() for image in x}


def test_control_images_have_the_labels_and_are_not_the_batch(tmp_path):
    request = Request(str(image_folder(tmp_path, count=6)), size=8, seed=3)
    by_content = {}
    for index in range(6):
        for image, label in zip(*load_batch("folder", request, 3, index)[:2], strict=True):
            by_content[image.numpy().tobytes()] = int(label)
    assert len(by_content) == 18
    x, y, _ = load_batch("folder", request, 3, 1)
    other, decoys = load_control("folder", request, 1, y, 99)
    assert [by_content[image.numpy().tobytes()] for image in other] == y.tolist()
    assert len(rows_of(other)) == 3
    assert not rows_of(other) & rows_of(x)
    # As many decoys for each as the rarest class has left, of its label, none of them twice.
    wanted = Counter(y.tolist())
    count = min((6 - n - n) // n for n in wanted.values())
    assert (decoys.shape, decoys.dtype) == ((3, count, 3, 8, 8), torch.uint8)
    eight_bit = {
        _eight_bits(torch.frombuffer(bytearray(key), dtype=torch.float32)): label
        for key, label in by_content.items()
    }
    for of_image, label in zip(decoys, y.tolist(), strict=True):
        assert [eight_bit[image.numpy().tobytes()] for image in of_image] == [label] * count
    used = {image.numpy().tobytes() for image in decoys.flatten(0, 1)}
    assert len(used) == 3 * count
    assert not used & {_eight_bits(image) for image in torch.cat([x, other])}
    assert torch.equal(load_control("folder", request, 1, y, 99)[0], other)
    assert load_control("folder", request, 1, y, 1)[1].shape[1] == 1


def _eight_bits(image):
    """Content of a normalised image as decoys are stored."""
    mean, std = DATASETS["folder"].normalisation
    pixels = (image.view(3, 8, 8) * std + mean) * 255
    return pixels.round().byte().numpy().tobytes()


def test_control_needs_enough_images_of_a_class(tmp_path):
    request = Request(str(image_folder(tmp_path)), size=8)
    _, y, _ = load_batch("folder", request, 12, 0)
    with pytest.raises(InputError, match="class . of --data-name folder has too few images"):
        load_control("folder", request, 0, y, 99)


def test_without_more_images_there_are_no_decoys(tmp_path):
    request = Request(str(image_folder(tmp_path, count=2, classes=("a", "b"))), size=8)
    _, y, _ = load_batch("folder", request, 1, 0)
    other, decoys = load_control("folder", request, 0, y, 99)
    assert (len(other), decoys) == (1, None)
    flags = ("-a", "lenet", "-b", "1", "--image-size", "8", "--with-control")
    outcome = succeed(
        "training.py", "--data-name", "folder", "--data", tmp_path, *flags, "--results",
        tmp_path / "new",
    )  # fmt: skip
    assert "note: a class has too few images outside the batch for decoys" in outcome.out


def test_control_of_photos_are_public_photographs():
    request = Request(size=16, seed=2)
    _, y, spec = load_batch("photos", request, 4, 0)
    public = image_files.public_photographs(4, (3, 16, 16), seed=2)
    other, decoys = load_control("photos", request, 0, y, 5)
    assert torch.equal(other, normalise(public, spec))
    assert decoys.shape == (4, 5, 3, 16, 16)
    # None of them is a crop that the control or the attacker's public images have.
    shown = {image.numpy().tobytes() for image in decoys.flatten(0, 1)}
    public = image_files.public_photographs(128, (3, 16, 16), seed=2)
    assert len(shown) == 20
    assert not shown & {(image * 255).round().byte().numpy().tobytes() for image in public}


def test_a_backup_of_odd_tensors_is_refused(tmp_path):
    x, y = torch.randn(4, 3, 12, 12), torch.arange(4)
    for bad_x, bad_y, message in (
        (torch.ones(1).expand(2**20, 3, 32, 32), torch.zeros(1).long().expand(2**20), "only 1 are"),
        (x.to_sparse(), y, "x_true.pth.bk: it is a sparse_coo tensor"),
        (x, y.to("meta"), "y_true.pth.bk: it is on the meta device"),
        (x, y * 1j, "y_true is not integers: its dtype is torch.complex64"),
        ({"x": x}, y, "not a tensor"),
    ):
        torch.save(bad_x, tmp_path / "x_true.pth.bk")
        torch.save(bad_y, tmp_path / "y_true.pth.bk")
        with pytest.raises(InputError, match=f"--data-backup .*{message}"):
            load_backup(str(tmp_path), "cifar100", 4, 0)


def test_control_of_a_backup(tmp_path):
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    torch.save(x, tmp_path / "x_true.pth.bk")
    torch.save(y, tmp_path / "y_true.pth.bk")
    other, decoys = load_backup_control(str(tmp_path), "cifar100", 1, y[4:8], 99)
    assert decoys is None  # both others of label 1 are the control's
    # Labels 1, 2, 0, 1 of images 4 to 7; the first others of those labels.
    assert torch.equal(other, x[[1, 2, 0, 10]])
    with pytest.raises(InputError, match="class 0 of --data-backup"):
        load_backup_control(str(tmp_path), "cifar100", 0, torch.zeros(4).long(), 99)


def test_spec_without_files(tmp_path):
    """Only where the class count stands in the files are they opened."""
    assert dataset_spec("celeba", Request(size=64)).shape == (3, 64, 64)
    assert dataset_spec("imagenet", Request()).num_classes == 1000
    assert dataset_spec("folder", Request(str(image_folder(tmp_path)))).num_classes == 3
    with pytest.raises(InputError, match="--data: missing"):
        dataset_spec("folder", Request())


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_of_scikit_learn_are_those_that_it_loads_itself(name):
    from sklearn.datasets import load_sample_image

    found, theirs = image_files.scikit_learn_photograph(name), load_sample_image(name)
    assert found.dtype == theirs.dtype
    assert np.array_equal(found, theirs)
