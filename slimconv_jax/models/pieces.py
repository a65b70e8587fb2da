"""Inference on CPUs a few images at a time, so that feature maps stay in the caches."""

from collections.abc import Callable

import jax

PIXELS = 2 * 224 * 224
"""How many pixels go through a network at once: two images as large as ImageNet's."""


def in_pieces(
    forward: Callable[[jax.Array], jax.Array], images: jax.Array, *, mesh: jax.sharding.Mesh
) -> jax.Array:
    """`forward(images)`, on a CPU a few images after the others.

    For functions that treat each image by itself, as networks do in evaluation mode. The results
    are the same, to rounding. On a CPU the feature maps of a whole batch fit into no cache, and
    memory for them comes anew with each call; other devices, and batches split over several, take
    all images at once.

    Args:
      forward: maps images (n, ...) to results (n, ...), for any n.
      images: (N, H, W, C).
      mesh: the devices that the batch is on.
    """
    count, height, width, _ = images.shape
    most = max(PIXELS // (height * width), 1)
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu" or count <= most:
        return forward(images)
    size = max(n for n in range(1, most + 1) if count % n == 0)
    results = jax.lax.map(forward, images.reshape(-1, size, *images.shape[1:]))
    return results.reshape(count, *results.shape[2:])
