import jax
import numpy as np
import pytest

from slimconv_jax.data.preprocessing import normalize
from slimconv_jax.training.augment import (
    augment,
    cutmix,
    mixup,
    random_crop,
    random_erase,
    random_flip,
)


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
    targets = np.eye(4)[np.arange(1000) % 4]
    both, same = augment(jax.random.key(0), images, targets, crop_padding=1, flip=True)
    both = np.asarray(both)
    assert len({image.tobytes() for image in both}) == 2 * 9  # nine crops, both ways
    assert both.dtype == np.uint8
    np.testing.assert_array_equal(same, targets)


def test_no_padding_is_no_change():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    targets = np.eye(3)
    same, same_targets = augment(jax.random.key(0), images, targets)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(same_targets, targets)


def test_some_images_lose_a_rectangle_to_noise():
    images = np.full((200, 32, 24, 3), 77, np.uint8)
    erased = np.asarray(random_erase(jax.random.key(0), images, probability=0.25))
    assert erased.dtype == np.uint8
    changed = (erased != images).any(-1)
    touched = changed.any(axis=(1, 2))
    assert 0.17 < touched.mean() < 0.33
    corners, shapes = set(), set()
    for image in changed[touched]:
        (rows,), (columns,) = np.nonzero(image.any(1)), np.nonzero(image.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        inside = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.mean() > 0.9 and inside.sum() == image.sum()  # noise may be 77, too
        assert 0.01 < height * width / (32 * 24) < 0.36 and 0.2 < height / width < 4.5
        corners.add((rows[0], columns[0]))
        shapes.add((height, width))
    assert len(corners) > 25 and len(shapes) > 25
    noise = erased[changed]
    assert abs(noise.mean() - 127.5) < 3 and noise.min() == 0 and noise.max() == 255


@pytest.mark.parametrize(
    "options",
    [
        {"randaugment_layers": 2},
        {"randaugment_layers": 1, "randaugment_magnitude": 1, "randaugment_std": 0},
        {"trivialaugment_wide": True},
        {"erase_probability": 1},
    ],
)
def test_policies_come_after_crop_and_flip_and_leave_those_as_they_are(options):
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    before = {"crop_padding": 2, "flip": True}
    key = jax.random.key(3)
    cropped, _ = augment(key, images, np.eye(8), **before)
    changed, targets = augment(key, images, np.eye(8), **before, **options)
    assert changed.dtype == np.uint8
    same = (np.asarray(changed) == cropped).mean()
    assert same < 0.95 and (same > 0.2 or options == {"erase_probability": 1} or same > 0.02)
    np.testing.assert_array_equal(targets, np.eye(8))


def mixing_data():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 12, 3), dtype=np.uint8)
    return images, np.eye(4, dtype=np.float32)


def test_mixup_blends_neighbours_with_one_share_of_the_beta_distribution():
    images, targets = mixing_data()
    shares = []
    for seed in range(300):
        mixed, mixed_targets = mixup(jax.random.key(seed), images, targets, alpha=0.4)
        share = float(mixed_targets[0, 0])
        shares.append(share)
        if seed < 3:
            blend = share * images.astype(float) + (1 - share) * np.roll(images, 1, 0).astype(float)
            np.testing.assert_allclose(mixed, blend, rtol=1e-4, atol=1e-3)
            expected = share * targets + (1 - share) * np.roll(targets, 1, 0)
            np.testing.assert_allclose(mixed_targets, expected, rtol=1e-6)
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1)).
    assert abs(np.mean(shares) - 0.5) < 0.08
    assert abs(np.var(shares) - 1 / (4 * 1.8)) < 0.03


def test_cutmix_pastes_rectangles_and_counts_their_area():
    images, targets = mixing_data()
    images = images // 2 + np.array([0, 128, 0, 128], np.uint8)[:, None, None, None]
    shares, sizes = [], set()
    for seed in range(300):
        mixed, mixed_targets = cutmix(jax.random.key(seed), images, targets, alpha=1.0)
        assert mixed.dtype == np.uint8
        pasted = np.asarray(mixed != images).all(axis=-1)
        assert (pasted == pasted[0]).all()
        rows, columns = pasted[0].any(axis=1), pasted[0].any(axis=0)
        assert (pasted[0] == rows[:, None] & columns).all()
        for line in (rows, columns):  # a rectangle in one piece
            assert np.abs(np.diff(np.pad(line, 1).astype(int))).sum() <= 2
        from_neighbour = np.roll(images, 1, axis=0)
        expected = np.where(pasted[..., None], from_neighbour, images)
        np.testing.assert_array_equal(mixed, expected)
        share = 1 - pasted[0].mean()
        expected = share * targets[1] + (1 - share) * targets[0]
        np.testing.assert_allclose(mixed_targets[1], expected, atol=1e-6)
        shares.append(share)
        sizes.add((rows.sum(), columns.sum()))
    # Uniform shares, less what lies beyond the border.
    assert 0.5 < np.mean(shares) < 0.75 and len(sizes) > 50


def test_with_both_each_batch_is_mixed_in_one_way():
    images, targets = mixing_data()
    options = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}
    mix = jax.jit(lambda key: augment(key, images, targets, **options))
    kinds = []
    for seed in range(60):
        mixed, mixed_targets = mix(jax.random.key(seed))
        np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, rtol=1e-6)
        whole = (np.asarray(mixed) == images) | (np.asarray(mixed) == np.roll(images, 1, 0))
        kinds.append(bool(whole.all()))
    assert 15 < sum(kinds) < 45
    mixed, _ = augment(jax.random.key(0), images, targets, cutmix_alpha=1.0)
    assert mixed.dtype == np.uint8  # for cutmix alone, what the model sees stays exact


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1}, "flip=1 must be True or False"),
        ({"mixup_alpha": -0.1}, "mixup_alpha=-0.1 must be a number >= 0"),
        ({"cutmix_alpha": "1"}, "cutmix_alpha='1' must be a number >= 0"),
        ({"randaugment_layers": -1}, "randaugment_layers=-1 must be an integer >= 0"),
        ({"randaugment_magnitude": 11}, "randaugment_magnitude=11 must be a number from 0 to 10"),
        ({"randaugment_std": -1}, "randaugment_std=-1 must be a number >= 0"),
        ({"trivialaugment_wide": "yes"}, "trivialaugment_wide='yes' must be True or False"),
        ({"erase_probability": 1.5}, "erase_probability=1.5 must be a number from 0 to 1"),
        (
            {"randaugment_layers": 2, "trivialaugment_wide": True},
            "randaugment_layers and trivialaugment_wide exclude each other",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        augment(jax.random.key(0), *mixing_data(), **options)


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
