"""Runs whose images grow: the phases, the learning rate, and the batches."""

import dataclasses
import itertools

import numpy as np
import optax
import pytest

from slimconv_jax.data.datasets import load_source
from slimconv_jax.data.loader import load_dataset
from slimconv_jax.devices import batch_sharded, data_mesh
from slimconv_jax.training.config import read_config
from slimconv_jax.training.timetable import (
    Phase,
    create_timetable,
    train_batches,
    transforms_of,
)


def config(*sizes, **keys):
    keys = {"batch_size": 8, "num_epochs": 6, "transform.image_size": 64} | keys
    arguments = [f"--config.{name}={value}" for name, value in keys.items()]
    return read_config("digits", [*arguments, f"--config.transform.progressive_sizes={sizes}"])


def test_smaller_images_come_in_larger_batches():
    timetable = create_timetable(config(32, 40), 100, multiple=8)
    # 8 * (64 / 32)**2 = 32; 8 * (64 / 40)**2 = 20.48, of which 16 are a multiple of 8.
    assert [phase.batch_size for phase in timetable.phases] == [32, 16, 8]
    assert [phase.first_epoch for phase in timetable.phases] == [0, 2, 4]
    # Two epochs of 100 images each: 6.25, 12.5 and 25 steps.
    assert [phase.first_step for phase in timetable.phases] == [0, 6, 18]
    assert timetable.total_steps == 43
    assert timetable.phase_of(0) == timetable.phase_of(6) == Phase(32)
    assert timetable.phase_of(7).batch_size == 16 and timetable.phase_of(43).batch_size == 8
    assert timetable.epoch_of(3) == 1 and timetable.epoch_of(43) == 6
    epochs = [timetable.epoch_of(step) for step in range(44)]
    assert sorted(epochs) == epochs
    evaluated = sorted(timetable.eval_steps)
    assert evaluated[-1] == 43 and all(
        abs(timetable.epoch_of(step) - epoch) < 0.2
        for step, epoch in zip(evaluated, (5, 6), strict=True)
    )


def test_one_size_has_the_steps_of_its_epochs():
    timetable = create_timetable(config(num_epochs=2, eval_every_epochs=1), 100)
    assert timetable.phases == (Phase(8),)
    assert timetable.total_steps == 25 and timetable.eval_steps == {12, 25}
    schedule = optax.constant_schedule(0.1)
    assert timetable.scale_schedule(schedule, with_batch=True) is schedule
    options = config(num_epochs=2, eval_every_epochs=1)
    options.checkpoint_every_steps = 10
    assert create_timetable(options, 100).checkpoint_steps == {10, 12, 20, 25}


def test_the_learning_rate_follows_the_epochs_and_the_batches():
    timetable = create_timetable(config(32, 40), 100, multiple=8)
    schedule = optax.linear_schedule(1.0, 0.0, 75)  # 6 epochs of 12.5 steps
    scaled = timetable.scale_schedule(schedule, with_batch=False)
    for step in (0, 3, 6, 7, 18, 30, 43):
        assert scaled(step) == pytest.approx(1 - timetable.epoch_of(step) / 6, abs=0.02)
    larger = timetable.scale_schedule(schedule, with_batch=True)
    factors = [float(larger(step) / scaled(step)) for step in (0, 5, 6, 17, 18, 42)]
    assert factors == [4, 4, 2, 2, 1, 1]


def test_each_phase_has_batches_of_its_own_and_a_run_can_start_anywhere():
    source = load_source("synthetic", "train", num_examples=40, num_classes=5, image_size=70)
    options = config(32, num_epochs=2)
    sharding = batch_sharded(data_mesh())
    transforms = transforms_of(options)
    datasets = [load_dataset(source, t, True, sharding, num_threads=1) for t in transforms]
    timetable = create_timetable(options, 40, multiple=8)
    assert timetable.total_steps == 1 + 5
    batches = list(train_batches(timetable, datasets, seed=3, first_step=0))
    shapes = [batch["image"].shape for batch in batches]
    assert shapes == [(32, 32, 32, 3)] + 5 * [(8, 64, 64, 3)]
    last = np.concatenate([batch["label"] for batch in batches[1:]])
    counts = np.bincount([source[index].label for index in range(40)], minlength=5)
    np.testing.assert_array_equal(np.bincount(last, minlength=5), counts)  # each image once
    same = dataclasses.replace(timetable, phases=(Phase(8), Phase(8, 3, 1)))
    phases = list(train_batches(same, datasets[1:] * 2, seed=3, first_step=0))
    orders = [np.concatenate([b["label"] for b in part]) for part in (phases[:3], phases[3:])]
    assert not np.array_equal(*orders)
    for first_step in (0, 1, 4):
        later = train_batches(timetable, datasets, seed=3, first_step=first_step)
        for again, batch in itertools.zip_longest(later, batches[first_step:]):
            np.testing.assert_array_equal(again["image"], batch["image"])


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_epochs=2 must be at least 3, one for each"):
        create_timetable(config(32, 40, num_epochs=2), 100)
    with pytest.raises(ValueError, match=r"only 20 images .*batch_size=8, which is 32 at 32 pixe"):
        create_timetable(config(32), 20)
    for sizes, message in [
        ((0,), "progressive_sizes: each=0 must be an integer >= 1"),
        ((64,), r"progressive_sizes=\(64,\) must ascend, to less than image_size=64"),
        ((48, 32), r"progressive_sizes=\(48, 32\) must ascend, to less than image_size=64"),
    ]:
        with pytest.raises(ValueError, match=message):
            transforms_of(config(*sizes))
    options = config(32)
    with options.unlocked():
        options.transform.image_size = None
    with pytest.raises(ValueError, match="progressive_sizes needs an image_size"):
        transforms_of(options)
