"""Inference in shares: one for each device, and on CPUs a few images at a time."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from slimconv_jax.models.variables import merge, variables

PIXELS = 2 * 224 * 224
"""The pixels that go through a network at once on a CPU: two images as large as ImageNet's."""


def in_pieces(
    model: nnx.Module,
    images: jax.Array,
    *,
    prepare: Callable[[jax.Array], jax.Array] = lambda images: images,
    mesh: jax.sharding.Mesh,
) -> jax.Array:
    """Computes `model(prepare(images))`: each device its share, a CPU a few images at a time.

    For models that treat each image by itself, as networks do in evaluation mode. The results
    are the same, up to rounding. No images move between devices: left to itself, XLA gathers the
    whole batch on each GPU for a grouped convolution. On a CPU the feature maps of a whole batch
    do not fit into a cache, and each call allocates memory for them anew.

    Args:
      model: maps images (n, ...) to results (n, ...), for any n; in evaluation mode.
      images: (N, H, W, C); the devices divide N.
      prepare: maps `images` to what the model takes.
      mesh: the devices that the batch is on.
    """
    split = PartitionSpec(mesh.axis_names)
    graphdef, arrays = nnx.graphdef(model), variables(model)

    def forward(images: jax.Array) -> jax.Array:
        # New variables inside the transforms: Flax's own, such as remat, refuse those from outside.
        return merge(graphdef, arrays)(prepare(images))

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
