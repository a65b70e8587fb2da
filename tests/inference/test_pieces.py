import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slimconv_jax.devices import batch_sharded, data_mesh
from slimconv_jax.inference import pieces
from slimconv_jax.inference.pieces import in_pieces


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


def test_each_device_takes_its_own_share_in_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 2 * 2 * 2)
    mesh = data_mesh()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4 * mesh.size, 2, 2, 3)))
    images = jax.device_put(images, batch_sharded(mesh))
    seen = []

    def forward(images):
        seen.append(len(images))
        return first_pixels(images)

    split = jax.jit(lambda images: in_pieces(forward, images, mesh=mesh))
    np.testing.assert_array_equal(split(images), first_pixels(images))
    assert set(seen) == {2}
    assert "all-" not in split.lower(images).compile().as_text()
