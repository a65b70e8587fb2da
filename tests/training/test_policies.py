"""The operations against Pillow, and what policies choose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from slimconv_jax.devices import batch_sharded, data_mesh, replicated
from slimconv_jax.training import policies
from slimconv_jax.training.policies import RANDAUGMENT, TRIVIALAUGMENT, randaugment, trivialaugment


def pictures():
    """A smooth picture, one of few values, one of one value, and noise: (4, 33, 40, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:33, :40]
    smooth = np.stack([3 * x + y, 130 - 2 * x + 3 * y, 60 + (x * y) // 12], -1)
    few = 100 + 7 * rng.integers(0, 3, smooth.shape)
    noise = rng.integers(0, 256, smooth.shape)
    return np.stack([smooth, few, np.full_like(few, 7), noise]).astype(np.uint8)


def enhanced(kind):
    return lambda image, factor: kind(image).enhance(factor)


def transformed(matrix):
    return lambda image, v: image.transform(image.size, Image.Transform.AFFINE, matrix(v))


FACTORS = np.round(np.linspace(0.01, 1.99, 23) * 2**12) / 2**12
SHEARS = np.linspace(-0.99, 0.99, 11)
PIXELS = (-40, -7.3, -0.5, 0, 0.4, 0.5, 3, 12.75)
PILLOW = {
    "brightness": (enhanced(ImageEnhance.Brightness), FACTORS),
    "color": (enhanced(ImageEnhance.Color), FACTORS),
    "contrast": (enhanced(ImageEnhance.Contrast), FACTORS),
    "sharpness": (enhanced(ImageEnhance.Sharpness), FACTORS),
    "invert": (lambda image, _: ImageOps.invert(image), (0,)),
    "posterize": (lambda image, bits: ImageOps.posterize(image, int(bits)), range(1, 9)),
    "solarize": (ImageOps.solarize, (0, 1, 100, 127.5, 255, 256)),
    "solarize_add": (
        lambda image, add: image.point(
            [min(i + add, 255) if i < 128 else i for i in range(256)] * 3
        ),
        (0, 50, 110),
    ),
    "equalize": (lambda image, _: ImageOps.equalize(image), (0,)),
    "shear_x": (transformed(lambda v: (1, v, 0, 0, 1, 0)), SHEARS),
    "shear_y": (transformed(lambda v: (1, 0, 0, v, 1, 0)), SHEARS),
    "translate_x": (transformed(lambda v: (1, 0, v, 0, 1, 0)), PIXELS),
    "translate_y": (transformed(lambda v: (1, 0, 0, 0, 1, v)), PIXELS),
}


def both(name, reference, numbers):
    """An operation of every picture with every number, here and by Pillow."""
    numbers = np.asarray(numbers, np.float32)
    operation = getattr(policies, name)
    over_all = jax.vmap(jax.vmap(operation, (None, 0)), (0, None))
    ours = jax.jit(over_all)(pictures(), numbers)
    theirs = [[reference(Image.fromarray(x), v) for v in numbers.tolist()] for x in pictures()]
    assert ours.dtype == np.uint8
    return np.asarray(ours).astype(int), np.array([list(map(np.asarray, row)) for row in theirs])


@pytest.mark.parametrize("name", PILLOW)
def test_operations_are_pillows_bit_for_bit(name):
    np.testing.assert_array_equal(*both(name, *PILLOW[name]))


def test_autocontrast_differs_from_pillow_by_one_where_its_doubles_fall_below_an_integer():
    ours, theirs = both("autocontrast", lambda image, _: ImageOps.autocontrast(image), (0,))
    difference = ours - theirs
    assert set(np.unique(difference)) <= {0, 1} and (difference != 0).mean() < 0.01


def test_a_rotation_differs_from_pillow_in_few_pixels():
    # Its matrix is float32; where a pixel's source lies between two pixels, the other is taken.
    angles = [*np.linspace(-135, 135, 28), 0]
    ours, theirs = both("rotate", lambda image, degrees: image.rotate(degrees), angles)
    assert (ours != theirs).any(-1).mean() < 5e-4


def test_every_operation_is_compared():
    compared = {*PILLOW, "autocontrast", "rotate", "identity"}
    assert RANDAUGMENT.keys() | TRIVIALAUGMENT.keys() == compared
    assert (len(RANDAUGMENT), len(TRIVIALAUGMENT)) == (15, 14)  # timm's and torchvision's


@pytest.mark.parametrize(
    ("table", "name", "weakest", "half", "strongest"),
    [  # the formulas of timm ("inc1") and torchvision
        (RANDAUGMENT, "rotate", 0, -15, -30),
        (RANDAUGMENT, "posterize", 4, 2, 1),
        (RANDAUGMENT, "solarize", 256, 128, 0),
        (RANDAUGMENT, "solarize_add", 0, 55, 110),
        (RANDAUGMENT, "color", 1, 0.55, 0.1),
        (RANDAUGMENT, "shear_x", 0, -0.15, -0.3),
        (RANDAUGMENT, "translate_y", 0, -0.225, -0.45),
        (TRIVIALAUGMENT, "rotate", 0, -67.5, -135),
        (TRIVIALAUGMENT, "posterize", 8, 5, 2),
        (TRIVIALAUGMENT, "solarize", 255, 127.5, 0),
        (TRIVIALAUGMENT, "sharpness", 1, 0.505, 0.01),
        (TRIVIALAUGMENT, "shear_y", 0, -0.495, -0.99),
        (TRIVIALAUGMENT, "translate_x", 0, -16, -32),
    ],
)
def test_numbers_of_operations(table, name, weakest, half, strongest):
    strength = jnp.array([0, 0.5, 1])
    numbers = table[name][1](strength, -jnp.ones(3))
    np.testing.assert_allclose(numbers, [weakest, half, strongest], rtol=1e-6, atol=1e-6)


def test_translations_of_randaugment_are_shares_of_the_side():
    picture = jnp.asarray(pictures()[0])
    moved = RANDAUGMENT["translate_x"][0](picture, jnp.float32(0.25))
    np.testing.assert_array_equal(moved[:, :30], picture[:, 10:])
    moved = RANDAUGMENT["translate_y"][0](picture, jnp.float32(-1 / 3))
    np.testing.assert_array_equal(moved[11:], picture[:-11])


def marks(number):
    """A policy that says what it did: the number of the operation, and the one it was given."""
    return {
        str(i): (
            lambda image, v, i=i: image.at[0, 0].set(i).at[0, 1].set(v.astype(jnp.uint8)),
            lambda strength, sign: 100 + sign * strength,
        )
        for i in range(number)
    }


def test_every_operation_is_as_likely_and_every_image_has_a_strength_of_its_own():
    images = np.full((64, 2, 2, 3), 200, np.uint8)

    @jax.jit
    def apply(key):
        def strengths(key, shape):
            return jax.random.randint(key, shape, 1, 50).astype(jnp.float32)

        return policies._apply(key, images, marks(3), strengths, probability=0.5)

    after = np.stack([apply(jax.random.key(seed)) for seed in range(100)])
    chosen, numbers = after[:, :, 0, 0, 0], after[:, :, 0, 1, 0]
    shares = [(chosen == value).mean() for value in (200, 0, 1, 2)]
    np.testing.assert_allclose(shares, [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.04)
    used = numbers[chosen != 200].astype(int) - 100
    assert len(set(used)) > 80 and abs((used > 0).mean() - 0.5) < 0.04
    assert len(set(chosen[0])) == 4  # not one operation a batch


@pytest.mark.parametrize("batch_size", [1, 3, 12, 32])
def test_batches_of_any_size(batch_size):
    images = np.repeat(pictures()[:1, :8, :8], batch_size, axis=0)
    changed = jax.jit(functools.partial(randaugment, layers=1, magnitude=9, std=0.5))
    after = np.stack([changed(jax.random.key(seed), images) for seed in range(8)])
    assert after.shape[1:] == images.shape and (after != images).any()


@pytest.mark.long
def test_more_layers_change_more_and_no_strength_changes_little():
    images = np.repeat(pictures()[3:], 32, axis=0)
    shares = []
    for layers in (1, 3):
        change = jax.jit(functools.partial(randaugment, layers=layers, magnitude=9, std=0.5))
        after = np.stack([change(jax.random.key(seed), images) for seed in range(20)])
        shares.append((after != images).any(axis=(2, 3, 4)).mean())
    assert 0.35 < shares[0] < 0.65 and 0.75 < shares[1] < 0.95


def test_an_image_is_the_same_on_any_number_of_devices():
    images = np.concatenate([pictures()[:, :16, :16]] * 8)
    for policy in (
        functools.partial(randaugment, layers=2, magnitude=9, std=0.5),
        trivialaugment,
    ):
        expected = jax.jit(policy)(jax.random.key(1), images)
        mesh = data_mesh()
        assert mesh.size == 8 and (np.asarray(expected) != images).any()
        split = jax.jit(
            policy,
            in_shardings=(replicated(mesh), batch_sharded(mesh)),
            out_shardings=batch_sharded(mesh),
        )
        np.testing.assert_array_equal(split(jax.random.key(1), images), expected)
