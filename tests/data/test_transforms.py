import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slimconv_jax.data.transforms import find_images, read_image, resize_and_crop


@pytest.mark.parametrize("size", [(300, 200), (98, 147), (199, 407), (256, 256), (64, 48)])
def test_shorter_side_to_256_then_the_central_square(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    # As torchvision's Resize(256) and CenterCrop(224) call Pillow.
    shorter, longer = sorted(size)
    resized = int(256 * longer / shorter)
    width, height = (256, resized) if size[0] <= size[1] else (resized, 256)
    left, top = round((width - 224) / 2.0), round((height - 224) / 2.0)
    expected = image.resize((width, height), Image.BILINEAR)
    expected = np.asarray(expected.crop((left, top, left + 224, top + 224)))
    result = resize_and_crop(image, 224)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)
    assert resize_and_crop(image, 32).shape == (32, 32, 3)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "RGB", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4)).save(path)
        assert read_image(path).mode == "RGB"
    (tmp_path / "below").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "below" / "A.JPEG")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in find_images(tmp_path)] == [
        "1.png",
        "CMYK.jpg",
        "L.png",
        "P.png",
        "RGB.png",
        "RGBA.png",
        "A.JPEG",
    ]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there are no images \(.bmp, .*\) in"):
        find_images(tmp_path)
    broken = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 90).save(broken)
    broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(ValueError, match=f"cannot read the image {broken}: "):
        read_image(broken)
    broken.write_text("<html>")
    with pytest.raises(ValueError, match=f"cannot read the image {broken}: "):
        read_image(broken)


def test_photos():
    root = os.environ.get("SLIMCONV_TEST_DATA")
    if not root:
        pytest.skip("SLIMCONV_TEST_DATA is not set")
    files = find_images(Path(root) / "imagenet_sample" / "val")
    assert len(files) == 100
    for file in files[::10]:
        assert resize_and_crop(read_image(file), 224).shape == (224, 224, 3)
