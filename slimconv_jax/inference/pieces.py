"""Inference: each device its share, on CPUs a few images at a time."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

PIXELS = 2 * 224 * 224
"""How many pixels go through a network at once: two images as large as ImageNet's."""


def in_pieces(
    forward: Callable[[jax.Array], jax.Array], images: jax.Array, *, mesh: jax.sharding.Mesh
) -> jax.Array:
    """`forward(images)`, on each device of its share, on a CPU of a few images after the others.

    For functions that treat each image by itself, as networks do in evaluation mode. The results
    are the same, to rounding. No device gets what another has: left to itself, XLA gathers the
    whole batch on each GPU for a grouped convolution. On a CPU the feature maps of a whole batch
    fit into no cache, and memory for them comes anew with each call.

    Args:
      forward: maps images (n, ...) to results (n, ...), for any n.
      images: (N, H, W, C); the devices divide N.
      mesh: the devices that the batch is on.
    """
    split = PartitionSpec(mesh.axis_names)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    def share(images: jax.Array) -> jax.Array:
        count, height, width, _ = images.shape
        most = max(PIXELS // (height * width), 1)
        if mesh.devices.flat[0].platform != "cpu" or count <= most:
            return forward(images)
        size = max(n for n in range(1, most + 1) if count % n == 0)
        results = jax.lax.map(forward, images.reshape(-1, size, *images.shape[1:]))
        return results.reshape(count, *results.shape[2:])

    return share(images)
