"""Image folders, whatever is in them: each file is read rightly or refused by its name."""

import csv
import os
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps

from tests.support import ROOT, call, succeed
from tests.test_datasets import image_folder, write_images
from utils import image_folder as listing
from utils.errors import InputError
from utils.files import printable
from utils.image_files import covering_size, decode, load_auxiliary
from utils.image_reading import ColourError, DepthError, read_picture

DRAW = np.random.default_rng(0)
RGB = DRAW.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]
#: 16-bit values that use all their bits.
DEEP = GREY.astype(np.uint16) * 257


def read(path, channels=3, bit_depth=None):
    """Pixels (H, W, C) as numpy, and what was done."""
    pixels, reading = read_picture(str(path), channels, bit_depth)
    assert reading.size == (pixels.shape[2], pixels.shape[1])
    return pixels.permute(1, 2, 0).numpy(), reading.done


def png(width, height, depth, colour, rows, *extra):
    """A PNG byte by byte; extra: chunks (name, content) before the pixels."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


# One file --------------------------------------------------------------------------------------

#: EXIF orientation → how an array (H, W, …) that is stored so is turned upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("ending", ["png", "tif", "lzw.tif", "webp"])
def test_exif_turns_an_image(orientation, ending, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if ending == "webp" else {}
    if ending == "lzw.tif":
        options = {"compression": "tiff_lzw"}
    for values, channels, white in ((RGB, 3, 255), (GREY, 1, 255), (DEEP, 1, 65535)):
        if values is not RGB and ending == "webp":
            continue
        Image.fromarray(values).save(tmp_path / f"x.{ending}", exif=exif, **options)
        found, done = read(tmp_path / f"x.{ending}", channels)
        upright = UPRIGHT[orientation](values.reshape(6, 9, -1))
        np.testing.assert_allclose(found, upright / white, atol=1e-7)
        assert ("turned upright, as EXIF says" in done) == (orientation != 1)


def test_damaged_exif_data_leaves_the_image_as_stored(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=b"Exif\0\0XX no TIFF header")
    found, done = read(tmp_path / "x.png")
    assert (found == np.float32(RGB / np.float32(255))).all()
    assert done == ("taken as stored, for damaged EXIF data",)


def test_transparent_pixels_are_laid_on_black(tmp_path):
    alpha = np.array([0, 128, 255], dtype=np.uint8)[np.arange(54).reshape(6, 9) % 3]
    layers = np.dstack([RGB, alpha])
    Image.fromarray(layers).save(tmp_path / "rgba.png")
    found, done = read(tmp_path / "rgba.png")
    np.testing.assert_allclose(found, RGB / 255 * alpha[..., None] / 255, atol=1 / 255)
    assert (found[alpha == 255] == np.float32(RGB[alpha == 255] / np.float32(255))).all()
    assert done == ("partly transparent and laid on black",)
    Image.fromarray(np.dstack([GREY, alpha])).save(tmp_path / "la.png")
    found, done = read(tmp_path / "la.png", 1)
    np.testing.assert_allclose(found[..., 0], GREY / 255 * alpha / 255, atol=1 / 255)
    assert done == ("partly transparent and laid on black",)
    # An alpha that hides nothing changes nothing, and nothing is said.
    Image.fromarray(np.dstack([RGB, 255 + 0 * alpha])).save(tmp_path / "opaque.png")
    found, done = read(tmp_path / "opaque.png")
    assert (found == np.float32(RGB / np.float32(255))).all()
    assert done == ()


def test_one_colour_may_mean_transparent(tmp_path):
    """In a palette, in grey and in colour."""
    one = tuple(int(v) for v in RGB[2, 3])
    Image.fromarray(RGB).save(tmp_path / "rgb.png", transparency=one)
    found, done = read(tmp_path / "rgb.png")
    assert (found[2, 3] == 0).all()
    assert (found[0, 0] == np.float32(RGB[0, 0] / np.float32(255))).all()
    assert done == ("partly transparent and laid on black",)
    Image.fromarray(GREY).save(tmp_path / "grey.png", transparency=int(GREY[2, 3]))
    found, _ = read(tmp_path / "grey.png", 1)
    expected = np.where(GREY[2, 3] == GREY, 0, GREY)
    np.testing.assert_allclose(found[..., 0], expected / 255, atol=1e-7)
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "p.png")
    found, done = read(tmp_path / "p.png")
    assert (found[0] * 255).round().tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert done == ()
    for name in ("p.png", "p.gif"):
        palette.save(tmp_path / name, transparency=1)
        found, done = read(tmp_path / name)
        assert (found[0] * 255).round().tolist() == [[10, 20, 30], [0, 0, 0], [70, 80, 90]]
        assert done == ("partly transparent and laid on black",)
    palette.convert("PA").save(tmp_path / "pa.tif")
    assert (read(tmp_path / "pa.tif")[0][0] * 255).round().tolist()[2] == [70, 80, 90]


def test_other_colour_spaces(tmp_path):
    solid = Image.new("CMYK", (4, 3), (255, 0, 0, 0))  # all cyan
    for name in ("x.tif", "x.jpg"):
        solid.save(tmp_path / name)
        found, done = read(tmp_path / name)
        np.testing.assert_allclose(found, np.broadcast_to([0, 1, 1], (3, 4, 3)), atol=0.02)
        assert done == ("converted from CMYK without a colour profile",)
    photo = Image.fromarray(np.full((5, 5, 3), (200, 100, 50), dtype=np.uint8))
    photo.save(tmp_path / "ycc.jpg", quality=100, subsampling=0)  # stored as YCbCr
    found, done = read(tmp_path / "ycc.jpg")
    np.testing.assert_allclose(found[2, 2] * 255, [200, 100, 50], atol=3)
    assert done == ()
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(photo, srgb, lab, outputMode="LAB").save(tmp_path / "lab.tif")
    found, done = read(tmp_path / "lab.tif")
    np.testing.assert_allclose(found[2, 2] * 255, [200, 100, 50], atol=3)
    assert done == ("converted from CIELAB",)


def test_two_levels(tmp_path):
    Image.fromarray(GREY > 127).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png", 1)[0][..., 0] == (GREY > 127)).all()


def test_grey_and_colour_stand_in_for_each_other_only_without_loss(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "equal.png")
    Image.fromarray(RGB).save(tmp_path / "colour.png")
    copied, done = read(tmp_path / "grey.png", 3)
    assert done == ("grey and copied to three channels",)
    merged, said = read(tmp_path / "equal.png", 1)
    assert said == ("of three equal channels and read as grey",)
    assert (copied == merged).all()
    with pytest.raises(ColourError, match=r"colour\.png is in colour, among grey ones"):
        read(tmp_path / "colour.png", 1)


def test_bits_per_value(tmp_path):
    """The range is stated by the file or by the user; it is never guessed from the values."""
    path = tmp_path / "x.png"
    twelve = GREY.astype(np.uint16) * 16
    Image.fromarray(twelve).save(path)
    with pytest.raises(DepthError, match=r"x\.png holds values up to \d+, 12 bits of 16"):
        read(path, 1)
    for bits in (12, 14, 16):
        found, done = read(path, 1, bits)
        np.testing.assert_allclose(found[..., 0], twelve / (2**bits - 1), rtol=1e-6)
        assert done == (f"grey of 16 bits and read from 0 to {2**bits - 1}",)
    with pytest.raises(DepthError, match=r"x\.png holds .* are read from 0 to 1023"):
        read(path, 1, 10)
    Image.fromarray(DEEP).save(path)
    assert read(path, 1)[1] == ("grey of 16 bits and read from 0 to 65535",)
    Image.fromarray(GREY).save(path)  # files of 8 bits are not concerned
    np.testing.assert_allclose(read(path, 1, 12)[0][..., 0], GREY / 255, atol=1e-7)


def test_a_file_that_states_its_bits_is_believed(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 1365))
    np.testing.assert_allclose(read(tmp_path / "x.pgm", 1)[0][0, :, 0], [1, 1 / 3], atol=1e-4)
    row = [0, 1365, 4095, 2730]  # packed: three bytes for two values
    packed = int("".join(f"{value:012b}" for value in row), 2).to_bytes(6, "big")
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 134), (277, 1), (278, 1)]
    tags += [(279, 6), (282, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(header.ljust(134, b"\0") + packed)
    for given in (None, 16):
        found, done = read(tmp_path / "x.tif", 1, given)
        np.testing.assert_allclose(found[0, :, 0], [0, 1 / 3, 1, 2 / 3], rtol=1e-6)
        assert done == ("grey of 16 bits and read from 0 to 4095",)


@pytest.mark.parametrize("values", [GREY, DEEP], ids=["8 bits", "16 bits"])
def test_zero_may_mean_white(values, tmp_path):
    """TIFF files can say so, and X-ray images do."""
    stored = values if values is DEEP else 255 - values  # Pillow inverts 8 bits as it writes
    Image.fromarray(stored).save(tmp_path / "x.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "x.tif") as image:
        assert image.tag_v2[262] == 0
    white = 65535 if values is DEEP else 255
    np.testing.assert_allclose(
        read(tmp_path / "x.tif", 1)[0][..., 0], 1 - values / white, atol=1e-6
    )


def test_floats(tmp_path):
    values = (GREY / 255).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert (read(tmp_path / "x.tif", 1)[0][..., 0] == values).all()
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif holds nan to nan"):
        read(tmp_path / "x.tif", 1)
    signed = np.array([[-1000, 3000]], dtype=np.int32)  # as in computed tomography
    Image.fromarray(signed).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif holds -1000 to 3000"):
        read(tmp_path / "x.tif", 1, 12)


def test_colours_of_16_bits_lose_8(tmp_path):
    values = RGB.astype(">u2") * 257
    (tmp_path / "x.png").write_bytes(png(9, 6, 16, 2, [row.tobytes() for row in values]))
    found, done = read(tmp_path / "x.png")
    np.testing.assert_allclose(found, RGB / 255, atol=1e-7)
    assert done == ("of 16 bits per channel, of which 8 are read",)


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_frame_is_read(ending, tmp_path):
    first, second = Image.new("RGB", (9, 6), (255, 0, 0)), Image.new("RGB", (9, 6), (0, 0, 255))
    options = {"lossless": True} if ending == "webp" else {}
    path = tmp_path / f"x.{ending}"
    first.save(path, save_all=True, append_images=[second], **options)
    found, done = read(path)
    assert (found == [1, 0, 0]).all()
    assert done == ("the first of several frames or pages",)


def test_fitting_covers_the_rectangle_and_cuts_its_centre(tmp_path):
    for height, width in ((20, 60), (60, 20)):
        values = np.zeros((60, 60, 3), dtype=np.uint8)
        top, left = (60 - height) // 2, (60 - width) // 2
        values[top : top + height, left : left + width] = 255
        Image.fromarray(values).save(tmp_path / "x.png")
        assert (decode(str(tmp_path / "x.png"), 3, (height, width)).sum() == 0).item() is False
        Image.fromarray(values[top : top + height, left : left + width]).save(tmp_path / "y.png")
        whole = decode(str(tmp_path / "y.png"), 3, (height, width))
        assert whole.shape == (3, height, width)
        assert (whole == 1).all()
        centre = decode(str(tmp_path / "x.png"), 3, (60, 60))
        assert torch.equal(centre, torch.from_numpy(values).permute(2, 0, 1) / 255)
    assert torch.equal(
        decode(str(tmp_path / "x.png"), 3, 7), decode(str(tmp_path / "x.png"), 3, (7, 7))
    )


@pytest.mark.parametrize("goal", [(8, 8), (5, 9), (9, 5), (1, 30)])
def test_the_covering_size_is_the_least(goal):
    for height in (1, 3, 7, 16, 100):
        for width in (1, 2, 9, 31):
            scaled = covering_size(height, width, goal)
            assert scaled[0] >= goal[0]
            assert scaled[1] >= goal[1]
            factor = max(goal[0] / height, goal[1] / width)
            assert scaled == (
                max(goal[0], int(height * factor + 1e-9)),
                max(goal[1], int(width * factor + 1e-9)),
            )


def damaged(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.png", lambda whole: b"", "it is empty"),
        ("text.jpg", lambda whole: b"no image", "its content is of no kind that is read"),
        ("half.png", damaged, "truncated"),
        ("none.png", lambda whole: png(0, 6, 8, 2, []), "its content is of no kind that is read"),
        ("script.png", lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "of no"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused_by_name(name, content, says, tmp_path):
    write_images(tmp_path, 1)
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / name).write_bytes(content(whole))
    with pytest.raises(InputError, match=f"{name} is no readable image .*{says}.*; remove it"):
        read(tmp_path / name)


def test_any_damage_is_a_refusal_or_a_picture(tmp_path):
    """Cut anywhere, or with bytes changed at random; never another error."""
    draw, refused = np.random.default_rng(1), []
    for ending in ("png", "gif", "jpg", "tif", "bmp", "webp"):
        (path,) = write_images(tmp_path, 1, size=(9, 6), ending=ending)
        whole = path.read_bytes()
        changed = [whole[:n] for n in range(1, len(whole), 29)]
        for _ in range(12):
            copy = bytearray(whole)
            for place in draw.integers(0, len(copy), 3):
                copy[place] = draw.integers(256)
            changed.append(bytes(copy))
        for content in changed:
            path.write_bytes(content)
            try:
                assert decode(str(path), 3, 8).shape == (3, 8, 8)
            except InputError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert all(str(tmp_path) in text and "\n" not in text for text in refused)


def test_too_many_pixels_are_counted(tmp_path, monkeypatch):
    write_images(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(InputError, match=r"000\.png .*40×30 = 1,200 pixels, above 1,000.*scale it"),
    ):
        read(tmp_path / "000.png")
    write_images(tmp_path, 1, size=(900, 1))
    with pytest.raises(InputError, match=r"000\.png has 900×1 pixels: too narrow"):
        decode(str(tmp_path / "000.png"), 3, 20)


# The folder ------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    return image_folder(tmp_path / "set", count=2)


def names_of(folder, root):
    return [os.path.relpath(path, root) for path in folder.paths]


CLEAN = [f"{name}/{i:03d}.png" for name in ("cat", "dog", "owl") for i in (0, 1)]


def test_a_clean_folder_says_nothing(root):
    found = listing.image_folder(str(root))
    assert names_of(found, root) == CLEAN
    assert found.labels == [0, 0, 1, 1, 2, 2]
    assert found.classes == ["cat", "dog", "owl"]
    assert found.notes == ()


def test_the_order_is_that_of_torchvision(root):
    """So that batches of older versions are the same."""
    from torchvision.datasets import ImageFolder

    for name in ("a", "a/b", "a-b", "a b"):
        write_images(root / "cat" / name, 2)
    write_images(root / "dog", 1, ending="JPEG")
    theirs = ImageFolder(str(root))
    found = listing.image_folder(str(root))
    assert list(zip(found.paths, found.labels, strict=True)) == theirs.samples


def test_files_that_are_no_images_are_skipped_and_counted(root):
    for name in (".DS_Store", "cat/.hidden.png", "dog/Thumbs.db", "owl/._000.png"):
        (root / name).write_bytes(b"debris")
    (root / ".git").mkdir()
    (root / "__MACOSX").mkdir()
    for name in ("README.txt", "cat/labels.csv", "dog/run"):
        (root / name).write_text("words")
    write_images(root, 1)
    found = listing.image_folder(str(root))
    assert names_of(found, root) == CLEAN
    hidden, beside, other = found.notes
    assert hidden.startswith("hidden files, or files of file managers, skipped: 6 (")
    assert "… and 2 more)" in hidden
    assert beside == "images beside the class folders, not read: 1 (000.png)"
    assert other == "other files, not read: 3 (README.txt, cat/labels.csv, dog/run)"


def test_endings_in_upper_case_and_of_all_formats_are_read(tmp_path):
    endings = ("PNG", "Jpg", "JPEG", "gif", "webp", "bmp", "tiff", "ppm", "jp2")
    for ending in endings:
        write_images(tmp_path / "a" / ending, 1, ending=ending)
    found = listing.image_folder(str(tmp_path))
    assert len(found.paths) == len(endings)
    assert [decode(path, 3, 8).shape for path in found.paths] == [(3, 8, 8)] * len(endings)


def test_images_in_deeper_folders_belong_to_the_class_and_are_named(root):
    write_images(root / "cat" / "night", 2)
    found = listing.image_folder(str(root))
    assert found.labels.count(0) == 4
    (note,) = found.notes
    assert note == "images in subfolders of a class, read as of that class: 2 (cat/night)"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("scan.dcm", b"", "is an image of a kind that is not read; convert it"),
        ("brain.nii.gz", b"", "is an image of a kind that is not read"),
        ("photo.HEIC", b"", "is an image of a kind that is not read"),
        ("IM0001", bytes(128) + b"DICM", "holds DICOM, but its name ends as that of no image"),
        ("IM0002", None, "holds PNG, but its name ends as that of no image; rename it"),
    ],
)
def test_images_that_would_be_missed_are_refused(root, name, content, says):
    if content is None:
        content = (root / "cat" / "000.png").read_bytes()
    (root / "cat" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"^cat/{name} {says}"):
        listing.image_folder(str(root))
    (root / "dog" / "more.dcm").write_bytes(b"")
    with pytest.raises(InputError, match=f"^cat/{name} .* \\(and 1 more such files\\)$"):
        listing.image_folder(str(root))


def test_links_that_lead_back_up_end(root):
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "me").symlink_to(root / "cat")
    (root / "cat" / "far").symlink_to("/")
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "up").symlink_to(root / "cat")
    (root / "dog" / "self").symlink_to(root / "dog" / "self")
    found = listing.image_folder(str(root))
    assert names_of(found, root) == CLEAN
    up, other = found.notes
    assert up == "links that lead back up, not followed: 4 (cat/deep/up, cat/far, cat/me, cat/up)"
    assert other == "other files, not read: 1 (dog/self)"


def test_links_to_elsewhere_are_followed_once(root, tmp_path):
    elsewhere = write_images(tmp_path / "elsewhere", 2, size=(12, 10))
    (root / "cat" / "z").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "zz").symlink_to(tmp_path / "elsewhere")  # the same folder again
    (root / "owl" / "x.png").symlink_to(write_images(tmp_path / "far", 1, size=(7, 9))[0])
    (root / "dog" / "y.png").symlink_to(root / "dog" / "000.png")  # the same file again
    found = listing.image_folder(str(root))
    names = names_of(found, root)
    assert names == [*CLEAN[:2], "cat/z/000.png", "cat/z/001.png", *CLEAN[2:], "owl/x.png"]
    assert decode(found.paths[2], 3, 10).shape == (3, 10, 10)
    assert elsewhere[0].samefile(found.paths[2])
    said = " ".join(found.notes)
    assert "links to outside the folder, followed: 2 (cat/z, owl/x.png)" in said
    assert "second links to the same folder, skipped: 1 (cat/zz)" in said
    assert "second links to the same file, skipped: 1 (dog/y.png)" in said


def test_one_file_in_two_classes_is_refused(root):
    (root / "owl" / "x.png").symlink_to(root / "cat" / "000.png")
    with pytest.raises(
        InputError, match=r"^cat/000\.png and owl/x\.png are the same file by a link"
    ):
        listing.image_folder(str(root))
    (root / "owl" / "x.png").unlink()
    (root / "cat" / "birds").symlink_to(root / "owl")
    with pytest.raises(InputError, match="^cat/birds and owl are the same folder by a link"):
        listing.image_folder(str(root))


def test_links_to_nothing_and_pipes_are_refused(root):
    (root / "cat" / "x.png").symlink_to(root / "gone.png")
    with pytest.raises(InputError, match=r"^cat/x\.png is a link to nothing; remove it"):
        listing.image_folder(str(root))
    (root / "cat" / "x.png").unlink()
    os.mkfifo(root / "cat" / "x.png")
    with pytest.raises(InputError, match=r"^cat/x\.png is no regular file; remove it"):
        listing.image_folder(str(root))
    with pytest.raises(InputError, match=r"x\.png is no file"):
        read(root / "cat" / "x.png")


def test_a_folder_that_cannot_be_read_is_refused(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="^dog cannot be read: Permission denied"):
        listing.image_folder(str(root))


def test_classes_without_images_are_named(root, tmp_path):
    (root / "bat").mkdir()
    (root / "cow").mkdir()
    (root / "cow" / "list.txt").write_text("words")
    with pytest.raises(
        InputError, match=r"in each: no images in bat, cow; other files, not read: 1"
    ):
        listing.image_folder(str(root))
    write_images(tmp_path / "flat", 3)
    with pytest.raises(InputError, match="it has no subfolder, but 3 images"):
        listing.image_folder(str(tmp_path / "flat"))


def test_names_of_all_languages(tmp_path):
    names = ["é", "日本", "🦉", "a b", "%s", "=1+1"]
    root = image_folder(tmp_path / "🙂", classes=tuple(names), count=1)
    found = listing.image_folder(str(root))
    assert found.classes == sorted(names)
    assert [printable(name) for name in found.classes] == sorted(names)
    write_images(root / unicodedata.normalize("NFD", "é"), 1)
    with pytest.raises(InputError, match="two class folders are both called é, in different forms"):
        listing.image_folder(str(root))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", r"a\nb"), ("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\u202eb", r"a\u202eb"),
     (os.fsdecode(b"a\xffb"), r"a\udcffb")],
)  # fmt: skip
def test_names_that_would_break_a_line_are_escaped(name, shown, tmp_path):
    assert printable(name) == shown
    root = image_folder(tmp_path, count=1, classes=("dog",))
    write_images(root / name, 1)
    (root / name / "000.png").write_text("no image")
    flags = ("--data-name", "folder", "--data", root, "-a", "lenet", "-b", "2", "--dry-run")
    outcome = call("training.py", *flags)
    assert outcome.code == 2
    assert f"{shown}/000.png is no readable image" in outcome.err
    assert outcome.err.count("\n") == 1


def test_an_output_of_few_letters_shows_names_escaped(tmp_path):
    root = image_folder(tmp_path / "set", classes=("🦉", "é"), count=1)
    flags = ("--data-name", "folder", "--data", root, "-a", "lenet", "-b", "2")
    flags += ("--results", tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "training.py", *flags], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert r"\U0001f989/000.png" in done.stdout
    (log,) = tmp_path.glob("*.log")
    assert "🦉/000.png" in log.read_text(encoding="utf-8")


# What is said and written ----------------------------------------------------------------------


def capture(root, results, *flags):
    """What training.py prints, and its list as dicts."""
    outcome = succeed(
        "training.py", "--data-name", "folder", "--data", root, "-a", "lenet", "--image-size", "16",
        "--results", results, *flags,
    )  # fmt: skip
    (path,) = Path(results).glob("*-images.csv")
    with open(path, newline="", encoding="utf-8") as file:
        return outcome.out, list(csv.DictReader(file)), path


def test_the_list_says_which_file_is_which_image(tmp_path):
    root = image_folder(tmp_path / "set", classes=("cat", "two\nlines"), count=6)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        Image.new("RGB", (20 + i, 30), (20 * i, 20 * i, 20 * i)).save(path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (root / "cat" / "night").mkdir()
    Image.new("RGB", (30, 99), (240, 240, 240)).save(root / "cat" / "night" / "9.png", exif=exif)
    out, rows, path = capture(root, tmp_path / "out", "-b", "13", "--seal")
    assert "1 of 13 images is turned upright, as EXIF says" in out
    assert f"which image is which, as private as the truth: {path}" in out
    assert out.count("  image ") == 8
    assert "  … and 5 more" in out
    assert [int(row["image"]) for row in rows] == list(range(13))
    (truth,) = (tmp_path / "out").glob("*-truth.pth.tar")
    truth = torch.load(truth, weights_only=True)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    grey = (truth["x_true"] * std + mean).mean((1, 2, 3)) * 255
    for row, value, label in zip(rows, grey.tolist(), truth["y_true"].tolist(), strict=True):
        assert int(row["label"]) == label
        assert row["class"] == ("cat", r"two\nlines")[label]
        i = round(value / 20)
        if i == 12:
            assert (row["file"], row["width"], row["height"]) == ("cat/night/9.png", "99", "30")
            assert row["done"] == "turned upright, as EXIF says"
        else:
            assert row["file"] == f"{row['class']}/{i % 6:03d}.png"
            assert (row["width"], row["height"], row["done"]) == (str(20 + i), "30", "")
        assert row["mode"] == "RGB"
    assert sorted(int(row["number"]) for row in rows) == list(range(13))
    (checkpoint,) = (tmp_path / "out").glob("*-checkpoint.pth.tar")
    for name in (b"9.png", b"000.png", str(root).encode()):
        assert name not in checkpoint.read_bytes()


def test_the_list_of_photographs_and_of_a_backup(tmp_path):
    succeed("training.py", "--data-name", "photos", "-a", "lenet", "-b", "3", "--results", tmp_path)
    (path,) = tmp_path.glob("*-images.csv")
    assert path.read_text().splitlines()[1:] == [
        f"{i},{i},{name},,,,,," for i, name in enumerate(("astronaut", "chelsea", "coffee"))
    ]
    torch.save(torch.randn(6, 3, 32, 32), tmp_path / "x_true.pth.bk")
    torch.save(torch.tensor([1, 2, 3, 4, 5, 6]), tmp_path / "y_true.pth.bk")
    flags = ("--data-backup", tmp_path, "-a", "lenet", "-b", "2", "--target-idx", "1")
    succeed("training.py", "--data-name", "svhn", *flags, "--results", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*-images.csv")
    assert path.read_text().splitlines()[1:] == ["0,3,,,2,,,,", "1,4,,,3,,,,"]


def test_bit_depth_on_the_command_line(tmp_path):
    root = tmp_path / "set"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        Image.fromarray(GREY.astype(np.uint16) * 16).save(root / name / "x.png")
    flags = (
        "--data-name",
        "folder",
        "--data",
        root,
        "-a",
        "lenet",
        "-b",
        "2",
        "--results",
        tmp_path,
    )
    outcome = call("training.py", *flags)
    assert outcome.code == 2
    assert "12 bits of 16, and does not say which is white; give --bit-depth" in outcome.err
    out, rows, _ = capture(root, tmp_path / "out", "-b", "2", "--bit-depth", "12")
    assert "2 of 2 images are grey of 16 bits and read from 0 to 4095" in out
    assert {row["done"] for row in rows} == {"grey of 16 bits and read from 0 to 4095"}
    with pytest.raises(DepthError, match="12 bits of 16"):
        load_auxiliary(str(root), 2, (1, 6, 9))
    images, labels = load_auxiliary(str(root), 2, (1, 6, 9), bit_depth=12)
    expected = torch.from_numpy(GREY.astype(np.float32) * 16 / 4095)
    torch.testing.assert_close(images, expected.expand(2, 1, 6, 9))
    assert labels.tolist() == [0, 1]
    plain = image_folder(tmp_path / "plain", count=1)
    out, _, _ = capture(plain, tmp_path / "idle", "-b", "2", "--bit-depth", "12")
    assert "no file of the batch has more than 8 bits: --bit-depth 12 idle" in out


def test_a_turned_file_makes_the_same_gradient_as_the_upright_one(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    upright = Image.fromarray(DRAW.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    stored = upright.transpose(Image.Transpose.ROTATE_270)
    gradients = []
    for name, image, options in (("a", upright, {}), ("b", stored, {"exif": exif})):
        image_folder(tmp_path / name, classes=("cat", "dog"), count=1, size=(20, 20))
        image.save(tmp_path / name / "cat" / "000.png", **options)
        capture(tmp_path / name, tmp_path / f"{name}-out", "-b", "2")
        (path,) = (tmp_path / f"{name}-out").glob("*-checkpoint.pth.tar")
        gradients.append(torch.load(path, weights_only=True)["target_gradient"])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*(torch.from_numpy(np.array(image)) for image in (upright, stored)))


def test_exif_transpose_is_what_is_compared_against():
    """The table UPRIGHT says what Pillow does with an image in memory."""
    for orientation, turned in UPRIGHT.items():
        image = Image.fromarray(RGB)
        image.getexif()[ExifTags.Base.Orientation] = orientation
        assert (np.asarray(ImageOps.exif_transpose(image)) == turned(RGB)).all()
