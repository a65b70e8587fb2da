import jax
import numpy as np
import pytest

from slimconv_jax.training.augment import augment, normalize, random_crop, random_flip


def test_normalize():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize(images, mean=mean, std=std), expected, atol=1e-6)


def test_random_crops_are_shifts_by_every_offset():
    image = np.arange(1, 5 * 6 * 1 + 1, dtype=np.uint8).reshape(5, 6, 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    shifts = {(i, j): padded[i : i + 5, j : j + 6] for i in range(5) for j in range(5)}
    crops = np.asarray(random_crop(jax.random.key(0), np.stack([image] * 500), padding=2))
    seen = {
        next(shift for shift, wanted in shifts.items() if np.array_equal(crop, wanted))
        for crop in crops
    }
    assert seen == set(shifts)


def test_half_of_the_images_are_mirrored():
    images = np.arange(2 * 3 * 1, dtype=np.uint8).reshape(1, 2, 3, 1).repeat(1000, axis=0)
    flipped = np.asarray(random_flip(jax.random.key(0), images))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((flipped == images).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert 440 < mirrored.sum() < 560
    np.testing.assert_array_equal(augment(jax.random.key(0), images), images)
    both = np.asarray(augment(jax.random.key(0), images, crop_padding=1, flip=True))
    assert len({image.tobytes() for image in both}) == 2 * 9  # nine crops, both ways
    with pytest.raises(ValueError, match="flip=1 must be True or False"):
        augment(jax.random.key(0), images, flip=1)


def test_no_padding_is_no_change():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(augment(jax.random.key(0), images), images)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0, 0), (1, 1, 1)),
        ((0, 0, 0), (1, 1)),
        ((0, 0, 0), (1, 0, 1)),
        (("a", "b", "c"), (1, 1, 1)),
        (0.5, (1, 1, 1)),
        ((0, 0, 0), None),
        ((0, float("nan"), 0), (1, 1, 1)),
    ],
)
def test_bad_normalization(mean, std):
    with pytest.raises(ValueError, match="must be three numbers each"):
        normalize(np.zeros((1, 2, 2, 3), np.uint8), mean=mean, std=std)


@pytest.mark.parametrize("padding", [-1, 1.5])
def test_bad_padding(padding):
    with pytest.raises(ValueError, match=f"crop_padding={padding} must be an integer >= 0"):
        random_crop(jax.random.key(0), np.zeros((1, 2, 2, 3), np.uint8), padding=padding)
