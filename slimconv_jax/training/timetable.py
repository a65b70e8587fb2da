"""The schedule of a run: its steps, epochs, sizes of images, and batches."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from slimconv_jax.data.loader import Batch, ResidentDataset, StreamedDataset
from slimconv_jax.data.transforms import Transform
from slimconv_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with images of one size.

    Attributes:
      batch_size: images of a step, on all devices together.
      first_step: steps before it.
      first_epoch: epochs before it.
    """

    batch_size: int
    first_step: int = 0
    first_epoch: int = 0


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The schedule of a run, in steps.

    Attributes:
      num_images: to train on.
      phases: at least one, in order.
      total_steps: of the run.
      eval_steps: those after which the model is evaluated and saved.
      checkpoint_steps: all those after which it is saved, except for `checkpoint_every_minutes`.
    """

    num_images: int
    phases: tuple[Phase, ...]
    total_steps: int
    eval_steps: frozenset[int]
    checkpoint_steps: frozenset[int]

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch of the last phase, not necessarily a whole number."""
        return self.num_images / self.phases[-1].batch_size

    def phase_of(self, step: int) -> Phase:
        """Returns the phase of a step, which is counted from 1."""
        return next(phase for phase in reversed(self.phases) if phase.first_step < max(step, 1))

    @property
    def knots(self) -> tuple[list[int], list[float]]:
        """Steps at which phases begin, then all of them, and the epochs before each."""
        last, steps = self.phases[-1], [phase.first_step for phase in self.phases]
        rest = (self.total_steps - last.first_step) / self.steps_per_epoch
        epochs = [phase.first_epoch for phase in self.phases]
        return [*steps, self.total_steps], [*epochs, last.first_epoch + rest]

    def epoch_of(self, step: int) -> float:
        """Returns the epochs after `step` steps."""
        return float(np.interp(step, *self.knots))

    def scale_schedule(self, schedule: optax.Schedule, *, with_batch: bool) -> optax.Schedule:
        """Returns the schedule of the steps of this run, in the terms of its epochs.

        Args:
          schedule: by step, for batches of the last phase all along.
          with_batch: whether its values grow with the batches of the other phases.
        """
        if len(self.phases) == 1:
            return schedule
        steps, epochs = map(np.array, self.knots)
        factors = np.array([p.batch_size / self.phases[-1].batch_size for p in self.phases])

        def scaled(step: jax.Array) -> jax.Array:
            value = schedule(jnp.interp(step, steps, epochs) * self.steps_per_epoch)
            phase = jnp.searchsorted(steps[1:-1], step, side="right")
            return value * jnp.asarray(factors)[phase] if with_batch else value

        return scaled


def create_timetable(
    config: ml_collections.ConfigDict, num_images: int, *, multiple: int = 1
) -> Timetable:
    """Returns the schedule of a run.

    With `config.transform.progressive_sizes`, the run has a phase for each of them, of as many
    epochs each as can be, and a last one for `image_size`. In the others batches are larger, so
    that they have about as many pixels.

    Args:
      config: of the run.
      num_images: to train on.
      multiple: batches must be multiples of this.

    Raises:
      ValueError: if there are too few images or epochs, or the run is too long.
    """
    sizes = [transform.image_size for transform in transforms_of(config)]
    if config.num_epochs < len(sizes):
        raise InputError(
            f"config.num_epochs={config.num_epochs} must be at least {len(sizes)}, one for each of "
            f"the image sizes {tuple(sizes)}"
        )
    phases, step, ends = [], 0, [0]
    for number, size in enumerate(sizes, 1):
        batch_size = config.batch_size
        if size != sizes[-1]:
            scaled = int(batch_size * (sizes[-1] / size) ** 2)
            batch_size = max(scaled // multiple * multiple, batch_size)
        if num_images < batch_size:
            what = f"config.batch_size={config.batch_size}"
            what += f", which is {batch_size} at {size} pixels" if number < len(sizes) else ""
            raise InputError(f"there are only {num_images} images to train on, fewer than {what}")
        phases.append(Phase(batch_size, step, ends[-1]))
        ends.append(round(config.num_epochs * number / len(sizes)))
        step += max(round((ends[-1] - ends[-2]) * num_images / batch_size), 1)
    if step >= 2**31:
        raise InputError(
            f"config.num_epochs={config.num_epochs} are {step} steps of "
            f"config.batch_size={config.batch_size}; a run must have fewer than 2**31 steps"
        )

    def step_of(epoch: int) -> int:
        phase = next(phase for phase in reversed(phases) if phase.first_epoch <= epoch)
        more = (epoch - phase.first_epoch) * num_images / phase.batch_size
        return phase.first_step + round(more)

    eval_epochs = range(config.eval_every_epochs, config.num_epochs, config.eval_every_epochs)
    eval_steps = frozenset(map(step_of, eval_epochs)) | {step}
    every = config.checkpoint_every_steps
    checkpoint_steps = eval_steps.union(range(every, step, every) if every else ())
    return Timetable(num_images, tuple(phases), step, eval_steps, checkpoint_steps)


def transforms_of(config: ml_collections.ConfigDict) -> list[Transform]:
    """Returns how images come to their size in each phase of a run."""
    last = Transform(**config.transform)
    sizes = (*last.progressive_sizes, last.image_size)
    return [dataclasses.replace(last, image_size=size, progressive_sizes=()) for size in sizes]


def train_batches(
    timetable: Timetable,
    datasets: Sequence[ResidentDataset | StreamedDataset],
    *,
    seed: int,
    first_step: int,
) -> Iterator[Batch]:
    """Yields the batches of a run, phase by phase.

    The batch of a step depends on the seed and the step alone. Each phase begins an order of the
    images of its own.

    Args:
      timetable: of the run.
      datasets: for each phase.
      seed: of the orders and crops.
      first_step: steps done before.
    """
    ends = [phase.first_step for phase in timetable.phases[1:]] + [timetable.total_steps]
    for number, (phase, data, end) in enumerate(zip(timetable.phases, datasets, ends, strict=True)):
        start = max(first_step, phase.first_step)
        if start >= end:
            continue
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) if number else seed
        batches = data.train_batches(
            phase.batch_size, seed=own, first_step=start - phase.first_step
        )
        yield from itertools.islice(batches, end - start)
