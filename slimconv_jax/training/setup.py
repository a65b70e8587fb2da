"""From a config to the programs of a run, for the devices here or for others."""

import functools
from collections.abc import Callable

import jax
import ml_collections
import optax

from slimconv_jax.models.resnet import ResNet
from slimconv_jax.training.augment import augment, normalize
from slimconv_jax.training.config import arguments
from slimconv_jax.training.optimizer import create_optimizer, create_schedule
from slimconv_jax.training.step import make_train_step


def create_step(
    config: ml_collections.ConfigDict,
    model: ResNet,
    *,
    steps_per_epoch: float,
    total_steps: int,
    mesh: jax.sharding.Mesh,
) -> tuple[optax.GradientTransformation, functools.partial]:
    """The optimiser of a run, and its training step, which is not compiled yet.

    Args:
      config: which `check_config` has passed.
      model: gives the structure of the computation; its arrays are not used.
      steps_per_epoch: not necessarily a whole number.
      total_steps: of the run.
      mesh: from `data_mesh`.

    Returns:
      What `create_optimizer` and `make_train_step` return.

    Raises:
      ValueError: if a setting is out of range.
    """
    learning_rate_fn = create_schedule(
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        **arguments(config.optimizer, create_schedule),
    )
    optimizer = create_optimizer(learning_rate_fn, **arguments(config.optimizer, create_optimizer))
    train_step = make_train_step(
        model,
        optimizer,
        learning_rate_fn,
        num_classes=model.config.num_classes,
        augment=functools.partial(augment, **config.augment),
        normalize=create_preprocess(config),
        key=random_keys(config)[1],
        mesh=mesh,
        **config.step,
    )
    return optimizer, train_step


def create_preprocess(config: ml_collections.ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """From the images of a batch to what the model takes."""
    return functools.partial(normalize, **config.normalize)


def random_keys(config: ml_collections.ConfigDict) -> tuple[jax.Array, jax.Array]:
    """The random keys of the initial parameters and of the steps."""
    return tuple(jax.random.split(jax.random.key(config.seed)))


def uses_ema(config: ml_collections.ConfigDict) -> bool:
    """Whether a run keeps averaged weights."""
    return config.step.get("ema_decay", 0) > 0
