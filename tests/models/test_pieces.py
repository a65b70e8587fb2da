import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimconv_jax.models import pieces
from slimconv_jax.models.pieces import in_pieces
from slimconv_jax.training.step import data_mesh


def first_pixels(images):
    return images[:, 0, 0] * 2


@pytest.mark.parametrize(
    ("count", "piece"), [(0, 0), (1, 1), (6, 3), (7, 1), (9, 3), (4, 4), (10, 2)]
)
def test_pieces_of_equal_size_and_no_more_pixels_than_allowed(count, piece, monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 4 * 2 * 5 + 9)  # of 2x5: four images
    images = jnp.asarray(np.random.default_rng(0).normal(size=(count, 2, 5, 3)), jnp.float32)
    seen = []

    def forward(images):
        seen.append(len(images))
        return first_pixels(images)

    mesh = data_mesh(jax.devices()[:1])
    results = jax.jit(lambda images: in_pieces(forward, images, mesh=mesh))(images)
    np.testing.assert_array_equal(results, first_pixels(images))
    assert set(seen) == {piece}


def test_what_is_split_over_devices_stays_whole(monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 1)
    images = jnp.ones((8, 2, 2, 1))
    seen = []
    in_pieces(lambda images: seen.append(len(images)) or images, images, mesh=data_mesh())
    assert seen == [8]
