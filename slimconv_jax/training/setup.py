"""Builds the parts of a run from a config: data, model, steps; for the devices here or others."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from slimconv_jax.data.datasets import load_splits
from slimconv_jax.data.loader import ResidentDataset, StreamedDataset, load_dataset
from slimconv_jax.data.preprocessing import normalize, preprocessing_of
from slimconv_jax.data.transforms import MOST_SIDE, Transform
from slimconv_jax.devices import batch_sharded
from slimconv_jax.errors import InputError, InputWarning
from slimconv_jax.inference.eval_step import make_evaluate
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.variables import variables
from slimconv_jax.models.zoo import abstract_model, create_model, describe
from slimconv_jax.signatures import keys_of, select
from slimconv_jax.storage.model_directory import load_model, read_info
from slimconv_jax.training.augment import augment
from slimconv_jax.training.config import check_config
from slimconv_jax.training.distillation import create_teacher, newest_checkpoint
from slimconv_jax.training.fine_tuning import check_patterns
from slimconv_jax.training.loss import Loss, create_loss
from slimconv_jax.training.optimizer import (
    arguments_of,
    averaged_params,
    create_optimizer,
    create_schedule,
    is_schedule_free,
)
from slimconv_jax.training.regularization import draw_scales
from slimconv_jax.training.step import make_train_step
from slimconv_jax.training.timetable import Timetable, create_timetable, transforms_of


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run.

    Attributes:
      config: complete.
      mesh: the devices.
      model: abstract; it gives the structure of the computation.
      class_names: the name of each class.
      train_data: images to train on, at their size in each phase of `timetable`.
      test_data: batches to evaluate on.
      num_test_images: the number of test images, including those that are skipped.
      timetable: from `create_timetable`.
      optimizer: from `create_optimizer`.
      train_step: from `make_train_step`.
      evaluate: from `make_evaluate`.
    """

    config: ml_collections.ConfigDict
    mesh: jax.sharding.Mesh
    model: ResNet
    class_names: tuple[str, ...]
    train_data: tuple[ResidentDataset | StreamedDataset, ...]
    test_data: ResidentDataset | StreamedDataset
    num_test_images: int
    timetable: Timetable
    optimizer: optax.GradientTransformation
    train_step: functools.partial
    evaluate: Callable

    def info(self) -> dict[str, Any]:
        """Returns what `model.json` says besides the architecture; see `save_model`."""
        transform = Transform(**self.config.transform).for_tests()
        size = {"image_size": transform.image_size, "crop_ratio": transform.crop_ratio}
        return {
            "class_names": list(self.class_names),
            "preprocessing": {**size, **self.config.normalize.to_dict()},
            "image_shape": list(self.train_data[-1].image_shape),
        }


def create_parts(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Parts:
    """Builds the parts of a run; compiles and writes nothing.

    Args:
      config: from `complete`; of a teacher that is a training run, it gets the checkpoint.
      mesh: from `slimconv_jax.devices.data_mesh`.

    Raises:
      ValueError: if the config or the data cannot be used.
    """
    check_config(config, mesh.size)
    if config.distillation.weight and config.distillation.checkpoint is None:
        config.distillation.checkpoint = newest_checkpoint(config.distillation.teacher)
    train_source, test_source = load_splits(**config.dataset)
    class_names = train_source.class_names
    model = abstract_model(num_classes=len(class_names), **config.model)
    transforms = transforms_of(config)
    # Finds most errors of a config before images are decoded. No image is larger than this.
    _try_out(config, (MOST_SIDE, MOST_SIDE, 3), len(class_names))
    sharding = batch_sharded(mesh)
    train_data = tuple(
        load_dataset(train_source, transform, True, sharding, **config.loader)
        for transform in transforms
    )
    for_tests = Transform(**config.transform).for_tests()
    test_data = load_dataset(test_source, for_tests, False, sharding, **config.loader)
    for data in train_data:
        _try_out(config, data.image_shape, len(class_names))
    multiple = mesh.size * config.step.accumulation_steps
    timetable = create_timetable(config, len(train_data[-1]), multiple=multiple)
    optimizer, train_step = create_step(
        config, model, timetable=timetable, mesh=mesh, class_names=class_names
    )
    return Parts(
        config=config,
        mesh=mesh,
        model=model,
        class_names=class_names,
        train_data=train_data,
        test_data=test_data,
        num_test_images=len(test_source),
        timetable=timetable,
        optimizer=optimizer,
        train_step=train_step,
        evaluate=make_evaluate(
            model, normalize=create_normalize(config), mesh=mesh, loss=_other_loss(config, model)
        ),
    )


def _try_out(
    config: ml_collections.ConfigDict, image_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Checks that images of a shape can be augmented and normalised."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    target = jax.ShapeDtypeStruct((1, num_classes), jnp.float32)
    jax.eval_shape(functools.partial(augment, **config.augment), jax.random.key(0), image, target)
    jax.eval_shape(create_normalize(config), image)


def create_step(
    config: ml_collections.ConfigDict,
    model: ResNet,
    *,
    timetable: Timetable,
    mesh: jax.sharding.Mesh,
    class_names: Sequence[str] | None = None,
) -> tuple[optax.GradientTransformation, functools.partial]:
    """Builds the optimiser of a run and its training step, which is not compiled yet.

    Args:
      config: a config that passed `check_config`.
      model: gives the structure of the computation; its arrays are not used.
      timetable: of the run.
      mesh: from `slimconv_jax.devices.data_mesh`.
      class_names: of the data; None where they are unknown.

    Returns:
      What `create_optimizer` and `make_train_step` return.

    Raises:
      ValueError: if a setting is out of range.
    """
    options = select(config.optimizer, create_schedule)
    steps_per_epoch = timetable.steps_per_epoch
    total_steps = max(round(config.num_epochs * steps_per_epoch), 1)
    learning_rate_fn = timetable.scale_schedule(
        create_schedule(config.batch_size, steps_per_epoch, total_steps, **options),
        with_batch=config.optimizer.base_batch_size is not None,
    )
    options = select(config.optimizer, create_optimizer)
    arguments = {k: config.optimizer[k] for k in arguments_of(config.optimizer.name)}
    optimizer = create_optimizer(learning_rate_fn, **options, **arguments)
    params = variables(model)["params"]
    check_patterns(params, **select(config.optimizer, check_patterns))
    try:
        _, state = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
        if any(0 in leaf.shape for leaf in jax.tree.leaves(state)):
            raise ValueError("its state has arrays without elements, which checkpoints cannot hold")
    except (TypeError, ValueError) as error:
        reason = f"optimizer: {config.optimizer.name} cannot train this model: {error}"
        raise InputError(reason) from None
    draw = functools.partial(draw_scales, config=model.config, **select(config.step, draw_scales))
    jax.eval_shape(functools.partial(draw, num_images=1), jax.random.key(0))  # raises
    train_step = make_train_step(
        model,
        optimizer,
        learning_rate_fn,
        num_classes=model.config.num_classes,
        augment=functools.partial(augment, **config.augment),
        normalize=create_normalize(config),
        key=random_keys(config)[1],
        mesh=mesh,
        loss=create_loss(model.config.num_classes, **select(config.step, create_loss)),
        draw_scales=draw,
        freeze=config.optimizer.freeze,
        average=averaged_params if is_schedule_free(config.optimizer.name) else None,
        teacher=create_teacher(
            model.config.num_classes, class_names, config.model.dtype, **config.distillation
        ),
        **select(config.step, make_train_step),
    )
    return optimizer, train_step


def _other_loss(config: ml_collections.ConfigDict, model: ResNet) -> Loss | None:
    """Returns the loss of a run if it is not the cross-entropy that evaluations have anyway."""
    options = select(config.step, create_loss)
    if all(options[name] == key.default for name, key in keys_of(create_loss).items()):
        return None
    return create_loss(model.config.num_classes, **options)


def create_normalize(config: ml_collections.ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """Returns the function that turns the images of a batch into inputs of the model."""
    return functools.partial(normalize, **config.normalize)


def random_keys(config: ml_collections.ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Returns the random keys of the initial parameters and of the steps."""
    return tuple(jax.random.split(jax.random.key(config.seed)))


def _compare_normalization(config: ml_collections.ConfigDict, path: str) -> None:
    """Warns if images are normalised otherwise than those that a model was trained with."""
    here, info = config.normalize.to_dict(), read_info(path)
    there = preprocessing_of(info) if "preprocessing" in info else None
    for name, values in here.items():
        if there and not np.allclose(values, getattr(there, name), atol=1e-3):
            warnings.warn(
                f"config.normalize.{name} is {tuple(values)}, and the weights of {path} were "
                f"trained with {tuple(getattr(there, name))}",
                InputWarning,
                stacklevel=2,
            )


def uses_ema(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a run keeps averaged weights."""
    return config.step.ema_decay > 0 or is_schedule_free(config.optimizer.name)


def create_initial(config: ml_collections.ConfigDict, num_classes: int) -> tuple[ResNet, str]:
    """Returns the model that a run starts with, and a description of where it comes from.

    Raises:
      ValueError: if `config.init_from` is not a model, or has another architecture.
    """
    path = config.init_from
    if not path and config.step.batch_norm == "frozen":
        raise InputError(
            "config.step.batch_norm='frozen' needs the statistics of a trained model: set "
            "config.init_from, or config.step.batch_norm='global'"
        )
    rngs = nnx.Rngs(random_keys(config)[0])
    model = create_model(rngs=rngs, num_classes=num_classes, **config.model)
    if not path:
        return model, "from scratch"
    other = load_model(path)
    _compare_normalization(config, path)
    same = {"num_classes": num_classes, "dilation": model.config.dilation}
    if dataclasses.replace(other.config, **same) != model.config:
        raise InputError(
            f"config.init_from={path!r} is {describe(other.config)}, and config.model is "
            f"{describe(model.config)}; they may differ in the number of classes only"
        )
    said = f"from the weights of {path}"
    if other.config.num_classes != num_classes:
        other.classifier = model.classifier
        said += f", but a new classifier of {num_classes} classes"
        if other.config.num_classes:
            said += f" instead of its {other.config.num_classes}"
    nnx.update(model, nnx.state(other))
    return model, said
