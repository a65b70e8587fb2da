import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slimconv_jax.devices import batch_sharded, data_mesh
from slimconv_jax.inference import pieces
from slimconv_jax.inference.pieces import in_pieces
from slimconv_jax.models.zoo import create_model


class FirstPixels(nnx.Module):
    """Notes how many images it is called with."""

    def __init__(self, seen):
        self.seen = nnx.static(seen)

    def __call__(self, images):
        self.seen.append(len(images))
        return first_pixels(images)


def first_pixels(images):
    return images[:, 0, 0] * 2


@pytest.mark.parametrize(
    ("count", "piece"), [(0, 0), (1, 1), (6, 3), (7, 1), (9, 3), (4, 4), (10, 2)]
)
def test_pieces_of_equal_size_and_no_more_pixels_than_allowed(count, piece, monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 4 * 2 * 5 + 9)  # of 2x5: four images
    images = jnp.asarray(np.random.default_rng(0).normal(size=(count, 2, 5, 3)), jnp.float32)
    seen = []

    mesh = data_mesh(jax.devices()[:1])
    results = jax.jit(lambda images: in_pieces(FirstPixels(seen), images, mesh=mesh))(images)
    np.testing.assert_array_equal(results, first_pixels(images))
    assert set(seen) == {piece}


def test_each_device_takes_its_own_share_in_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 2 * 2 * 2)
    mesh = data_mesh()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4 * mesh.size, 2, 2, 3)))
    images = jax.device_put(images, batch_sharded(mesh))
    seen = []

    split = jax.jit(lambda images: in_pieces(FirstPixels(seen), images, mesh=mesh))
    np.testing.assert_array_equal(split(images), first_pixels(images))
    assert set(seen) == {2}
    assert "all-" not in split.lower(images).compile().as_text()


@pytest.mark.long
def test_a_model_that_rematerialises_gives_the_same(monkeypatch):
    monkeypatch.setattr(pieces, "PIXELS", 2 * 32 * 32)
    model = create_model(
        "sc_resnet14", width=8, num_classes=3, stem="cifar", remat=True, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(nnx.view(model, use_running_average=True))
    mesh = data_mesh(jax.devices()[:1])
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)

    @jax.jit
    def both(state, images):
        return nnx.merge(graphdef, state)(images), in_pieces(
            nnx.merge(graphdef, state), images, mesh=mesh
        )

    whole, pieced = both(state, images)
    np.testing.assert_allclose(pieced, whole, rtol=1e-4, atol=1e-5)
