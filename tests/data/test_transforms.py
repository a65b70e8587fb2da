import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_files import encode, smooth
from PIL import Image

from slimconv_jax.data import transforms
from slimconv_jax.data.image_files import find_images
from slimconv_jax.data.transforms import (
    Transform,
    decode_image,
    random_resized_crop,
    read_image,
    resize_and_crop,
    sample_crop,
)

DATA = os.environ.get("SLIMCONV_TEST_DATA")


def as_torchvision(image):
    """Resize(256) and CenterCrop(224) as torchvision calls Pillow for them, step by step."""
    width, height = image.size
    if width <= height:
        new_width, new_height = 256, int(256 * height / width)
    else:
        new_width, new_height = int(256 * width / height), 256
    image = image.resize((new_width, new_height), Image.BILINEAR)
    top = round((new_height - 224) / 2.0)
    left = round((new_width - 224) / 2.0)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


@pytest.mark.parametrize("size", [(300, 200), (98, 147), (199, 407), (256, 256), (64, 48)])
def test_shorter_side_to_256_then_the_central_square(size):
    image = Image.fromarray(smooth(size[1], size[0]))
    result = resize_and_crop(image, 224)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, as_torchvision(image))
    assert resize_and_crop(image, 32).shape == (32, 32, 3)


def test_the_central_part_is_as_large_as_asked_for():
    image = Image.fromarray(smooth(300, 400))
    resized = np.asarray(image.resize((314, 236), Image.Resampling.BILINEAR))  # 224 / 0.95
    np.testing.assert_array_equal(resize_and_crop(image, 224, 0.95), resized[6:230, 45:269])
    whole = np.asarray(image.resize((298, 224), Image.Resampling.BILINEAR))
    transform = Transform(160, test_size=224, crop_ratio=1.0)
    np.testing.assert_array_equal(
        transform.for_tests().for_evaluation(np.asarray(image), ""), whole[:, 37:261]
    )
    assert Transform(160).for_tests() == Transform(160) and Transform().for_tests() == Transform()


@pytest.mark.skipif(not DATA, reason="SLIMCONV_TEST_DATA is not set")
def test_evaluation_of_the_photos_is_pillows_to_the_bit():
    files = find_images(Path(DATA) / "imagenet_sample" / "val")
    assert len(files) == 100
    transform = Transform(224)
    for file in map(Path, files):
        ours = transform.for_evaluation(file.read_bytes(), str(file))
        with Image.open(file) as image:
            np.testing.assert_array_equal(ours, as_torchvision(image.convert("RGB")), str(file))


def files_of_all_kinds():
    """Name and bytes of images of every mode that ImageFolder meets."""
    colour = Image.fromarray(smooth(40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    deep = np.linspace(0, 65535, 1200).reshape(40, 30).astype(np.uint16)
    palette = colour.convert("P")
    palette.info["transparency"] = 3
    images = {
        "grey.png": (colour.convert("L"), {}),
        "grey.jpg": (colour.convert("L"), {}),
        "grey alpha.png": (colour.convert("LA"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "bits.png": (colour.convert("1"), {}),
        "rgba.png": (colour.convert("RGBA"), {}),
        "rgba.webp": (colour.convert("RGBA"), {"lossless": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "deep.png": (Image.fromarray(deep), {}),
        "deep.tif": (Image.fromarray(deep), {}),
        "rotated.jpg": (colour, {"exif": exif}),
        "progressive.jpg": (colour, {"progressive": True}),
        "restarts.jpg": (colour, {"restart_marker_rows": 1}),
        "colours.jpg": (colour, {"subsampling": 0}),
        "plain.bmp": (colour, {}),
        "plain.ppm": (colour, {}),
    }
    for name, (image, options) in images.items():
        stream = io.BytesIO()
        image.save(stream, Image.registered_extensions()["." + name.split(".")[1]], **options)
        yield name, stream.getvalue()


SAMPLING = {
    "4:1:0": (0x42, 0x11, 0x11),
    "3:1:1": (0x31, 0x11, 0x11),
    "mixed chroma": (0x22, 0x12, 0x21),
    "chroma finer than luma": (0x11, 0x22, 0x22),
    "2x1 on all": (0x21, 0x21, 0x21),
}


@pytest.mark.parametrize("factors", SAMPLING.values(), ids=SAMPLING)
def test_jpegs_of_unusual_sampling_are_read_in_training_as_in_evaluation(factors):
    data = bytearray(encode(smooth(48, 64), "JPEG", subsampling=0))
    components = data.index(b"\xff\xc0") + 10  # each: number, sampling factors, table
    data[components + 1 : components + 8 : 3] = bytes(factors)
    data = bytes(data)
    expected = np.asarray(decode_image(data, "x"))
    crop = random_resized_crop(
        data, "x", np.random.default_rng(0), size=48, scale=(1, 1), ratio=(4 / 3, 4 / 3)
    )
    wanted = cv2.resize(expected, (48, 48)).astype(int)
    assert np.abs(crop - wanted).mean() < 2.5


@pytest.mark.parametrize(("name", "data"), list(files_of_all_kinds()))
def test_every_kind_of_image_becomes_what_image_folder_makes_of_it(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with open(tmp_path / name, "rb") as file:  # torchvision's pil_loader
        expected = np.asarray(Image.open(file).convert("RGB"))
    assert expected.shape == (40, 30, 3)  # a rotated one is not turned
    np.testing.assert_array_equal(np.asarray(decode_image(data, name)), expected)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / name)), expected)
    # A random crop of everything is the whole image, but for the other filter.
    crop = random_resized_crop(
        data, name, np.random.default_rng(0), size=40, scale=(1, 1), ratio=(3 / 4, 3 / 4)
    )
    wanted = np.asarray(Image.fromarray(expected).resize((40, 40), Image.BILINEAR), int)
    assert np.abs(crop - wanted).mean() < 2.5


PHOTO = encode(smooth(300, 400), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PHOTO[: len(PHOTO) // 2], "image file is truncated"),
        (PHOTO[: len(PHOTO) // 2] + bytes(2000), "image file is truncated"),
        (PHOTO[:-2], "image file is truncated"),
        (PHOTO[:100], "cannot read the image"),
        (b"<html>", "it is in none of the formats"),
        (b"", "it is in none of the formats"),
        (encode(smooth(30, 40))[:-400], "cannot read the image"),
        (PHOTO[:2] + b"\xff\xd9", "cannot read the image"),
    ],
)
def test_damaged_images(data, reason, tmp_path):
    message = f"^cannot read the image x.jpg: .*{reason}" if "image x" in reason else reason
    for decode in (
        lambda: decode_image(data, "x.jpg"),
        lambda: random_resized_crop(
            data, "x.jpg", np.random.default_rng(0), size=8, scale=(0.5, 1), ratio=(1, 1)
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            decode()
        assert str(error.value).startswith("cannot read the image x.jpg: ")
    with pytest.raises(ValueError, match=r"^cannot read the image .*none\.jpg: No such file"):
        read_image(tmp_path / "none.jpg")


def jpegs():
    for subsampling in (0, 1, 2):
        yield encode(smooth(203, 310), "JPEG", subsampling=subsampling)
    yield encode(smooth(203, 310)[..., 0], "JPEG")
    yield encode(smooth(203, 310), "JPEG", restart_marker_blocks=3)


@pytest.mark.parametrize("data", list(jpegs()))
def test_a_jpeg_decoded_in_part_is_the_upper_part_of_the_whole(data):
    header = transforms._jpeg_header(data)
    assert (header.height, header.width) == (203, 310)
    for factor in (1, 2, 4, 8):
        whole = transforms._decode_jpeg(data, header, rows=203, factor=factor)
        assert whole.shape == (-(-203 // factor), -(-310 // factor), 3)
        for rows in (1, 8, 100, 202):
            part = transforms._decode_jpeg(data, header, rows=rows, factor=factor)
            assert part.shape == (-(-rows // factor), whole.shape[1], 3)
            np.testing.assert_array_equal(part, whole[: len(part)])
    part = transforms._decode_jpeg(data, header, rows=101, factor=1)
    pillow = np.asarray(decode_image(data, ""), int)[:101]
    assert np.abs(part - pillow).mean() < 1.5 and np.abs(part - pillow).max() < 16


def test_only_whole_sequential_jpegs_are_decoded_in_part():
    assert transforms._jpeg_header(PHOTO) is not None
    assert transforms._jpeg_header(PHOTO + bytes(20)) is not None  # padded
    for other in (
        PHOTO[:-2],
        PHOTO + b"more",
        encode(smooth(30, 40)),
        encode(smooth(30, 40), "JPEG", progressive=True),
        b"\xff\xd8" + PHOTO[-100:],
        np.zeros((2, 2, 3), np.uint8),
    ):
        assert transforms._jpeg_header(other) is None


@pytest.mark.parametrize("encoding", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [32, 100])  # smaller than half of the crop, or not
def test_a_random_resized_crop_is_that_part_of_the_image(encoding, size):
    pixels = smooth(300, 400)
    data = encode(pixels, encoding, **({"quality": 95} if encoding == "JPEG" else {}))
    for seed in range(20):
        top, left, height, width = sample_crop(
            np.random.default_rng(seed), 300, 400, (0.3, 1.0), (3 / 4, 4 / 3)
        )
        # A large part of a JPEG is decoded at a fraction, on whose pixels its edges lie.
        fits = [f for f in (8, 4, 2) if encoding == "JPEG" and min(height, width) >= f * size]
        f = max(fits, default=1)
        box = [left // f, top // f, -(-(left + width) // f), -(-(top + height) // f)]
        box = np.minimum(np.array(box) * f, [400, 300, 400, 300]).tolist()
        part = Image.fromarray(pixels).crop(box).resize((size, size), Image.BILINEAR)
        crop = random_resized_crop(
            data, "", np.random.default_rng(seed), size=size, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)
        )
        assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
        # Of 255; the part next to it, a pixel away in the result, would be off by twice as much.
        assert np.abs(crop - np.asarray(part, int)).mean() < 5


def test_fine_detail_is_averaged_where_a_crop_shrinks_a_lot():
    board = np.indices((301, 301)).sum(0) % 2 * 255
    data = encode(np.stack([board] * 3, axis=-1))
    rng = np.random.default_rng(0)
    crop = random_resized_crop(data, "", rng, size=32, scale=(0.9, 1), ratio=(1, 1))
    assert np.abs(crop - 127.5).max() < 30


def test_crops_have_areas_and_ratios_as_asked():
    rng = np.random.default_rng(0)
    crops = np.array([sample_crop(rng, 375, 500, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    top, left, height, width = crops.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 375).all() and (left + width <= 500).all()
    area, log_ratio = height * width / (375 * 500), np.log(width / height)
    assert area.min() < 0.09 and area.max() > 0.9
    assert np.abs(log_ratio).max() < np.log(4 / 3) + 0.03
    # Uniform where everything fits: small areas, and their ratios and places.
    small = area < 0.5
    np.testing.assert_allclose(area[small].mean(), 0.29, atol=0.01)
    np.testing.assert_allclose(log_ratio[small].std(), np.log(4 / 3) / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose((top / np.maximum(375 - height, 1))[small].mean(), 0.5, atol=0.02)
    np.testing.assert_allclose((left / np.maximum(500 - width, 1))[small].mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("size", "crop"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))]
)
def test_a_crop_that_fits_nowhere_is_central(size, crop):
    rng = np.random.default_rng(0)
    assert sample_crop(rng, *size, (0.5, 1.0), (3 / 4, 4 / 3)) == crop


def test_a_transform_of_no_size_leaves_images_alone():
    pixels = smooth(20, 30)
    transform = Transform()
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(transform.for_training(pixels, "", rng), pixels)
    np.testing.assert_array_equal(transform.for_evaluation(encode(pixels), ""), pixels)
    assert Transform(16).for_training(pixels, "", rng).shape == (16, 16, 3)
    assert Transform(16).for_evaluation(pixels, "").shape == (16, 16, 3)


def test_an_image_that_is_a_line_is_refused():
    message = "^cannot read the image line.png: at 2x1001 pixels, it is more than 500 times as long"
    with pytest.raises(ValueError, match=message):
        Transform(224).for_evaluation(encode(np.zeros((1001, 2, 3))), "line.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"^transform: image_size=0 must be an integer >= 1$"),
        (
            {"scale": (0, 1)},
            r"^transform: scale=\(0, 1\) must be two numbers, low and high, 0 < lo",
        ),
        ({"crop_ratio": 0}, "crop_ratio=0 must be a number from 0.1 to 1"),
        ({"test_size": 0}, "test_size=0 must be an integer >= 1"),
        ({"scale": (0.5, 2)}, r"0 < low <= high <= 1$"),
        ({"ratio": (2, 1)}, r"^transform: ratio=\(2, 1\) must be two numbers, .* 0 < low <= high$"),
        ({"ratio": 1.0}, "ratio=1.0 must be two numbers"),
        ({"ratio": (0.5, float("inf"))}, "must be two numbers"),
        ({"ratio": ("a", "b")}, "must be two numbers"),
    ],
)
def test_bad_transforms(options, message):
    with pytest.raises(ValueError, match=message):
        Transform(**options)
