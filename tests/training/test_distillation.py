"""What a student learns from a teacher, compared with PyTorch."""

import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from plain_step import build, make_batch
from randomize import randomized

from slimconv_jax.inference.saved import open_model
from slimconv_jax.models.variables import merge, variables
from slimconv_jax.models.zoo import abstract_model
from slimconv_jax.storage.model_directory import save_model
from slimconv_jax.training import distillation, loop
from slimconv_jax.training.distillation import create_teacher, newest_checkpoint

CLASSES = ["a", "b", "c"]
PREPROCESSING = {"image_size": 8, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


def small(width=4):
    options = {"width": width, "num_classes": 3, "stem": "cifar"}
    return randomized(lambda: abstract_model("resnet14", **options))


@pytest.fixture(scope="module")
def teacher_model():
    model = small(8)
    model.eval()
    return model


@pytest.fixture(scope="module")
def path(teacher_model, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("teacher") / "teacher")
    info = {"class_names": CLASSES, "preprocessing": PREPROCESSING}
    save_model(teacher_model, path, info=info)
    return path


def taught(path, **options):
    return create_teacher(3, CLASSES, None, teacher=path, **options)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_that_of_pytorch(path, temperature):
    rng = np.random.default_rng(0)
    ours, theirs = (rng.normal(size=(6, 3)).astype(np.float32) * 3 for _ in range(2))
    loss = taught(path, temperature=temperature).loss
    log_softmax = torch.nn.functional.log_softmax
    tensors = [torch.tensor(x, requires_grad=True) for x in (ours, theirs)]
    student, teacher = (log_softmax(x / temperature, dim=-1) for x in tensors)
    each = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
    expected = temperature**2 * each.sum(-1)
    np.testing.assert_allclose(loss(ours, theirs), expected.detach(), rtol=1e-5, atol=1e-6)
    expected.mean().backward()
    gradient = jax.grad(lambda x: loss(x, theirs).mean())(ours)
    np.testing.assert_allclose(gradient, tensors[0].grad, atol=1e-6)
    np.testing.assert_array_equal(loss(theirs, theirs), 0)


def test_hard_labels_are_those_of_the_teacher(path):
    rng = np.random.default_rng(1)
    ours, theirs = (rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2))
    labels = torch.tensor(theirs.argmax(-1))
    expected = torch.nn.functional.cross_entropy(torch.tensor(ours), labels, reduction="none")
    np.testing.assert_allclose(taught(path, hard=True).loss(ours, theirs), expected, rtol=1e-5)


def run_step(model, teacher, **options):
    step, state = build(model, optax.sgd(0.1), teacher=teacher, batch_norm="frozen", **options)
    state, metrics = step(state, batch := make_batch())
    return batch, state, {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"devices": 1, "accumulation_steps": 2}, marks=pytest.mark.long)]
)
def test_a_step_learns_from_labels_and_teacher(path, teacher_model, options):
    student = small()
    teacher = taught(path, weight=0.25, temperature=2.0)
    batch, state, metrics = run_step(student, teacher, **options)

    def losses(student, teacher_model):
        logits = student(batch["image"] / 255.0)
        mean, std = (np.array(PREPROCESSING[name]) for name in ("mean", "std"))
        answers = teacher_model(jnp.asarray((batch["image"] / 255.0 - mean) / std, jnp.float32))
        labels = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        parts = (labels.mean(), teacher.loss(logits, answers).mean())
        return 0.75 * parts[0] + 0.25 * parts[1], parts

    student.eval()
    gradient = nnx.jit(nnx.grad(losses, has_aux=True))
    grads, parts = gradient(student, teacher_model)
    labels, distance = map(float, parts)
    assert metrics["loss"] == pytest.approx(0.75 * labels + 0.25 * distance, rel=1e-4)
    assert metrics["label_loss"] == pytest.approx(labels, rel=1e-4)
    assert metrics["distillation_loss"] == pytest.approx(distance, rel=1e-4)
    assert distance > 0.01
    grads = nnx.to_pure_dict(grads)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables(student)["params"], grads)
    for ours, reference in zip(*map(jax.tree.leaves, (state.params, expected)), strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher_model, path):
    teacher = taught(path, weight=1.0)._replace(normalize=lambda images: images / 255.0)
    _, state, metrics = run_step(teacher_model, teacher)
    assert metrics["distillation_loss"] == metrics["loss"] == 0
    assert metrics["grad_norm"] < 1e-5
    for a, b in zip(
        *map(jax.tree.leaves, (state.params, variables(teacher_model)["params"])), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_has_the_dtype_and_the_weights_that_are_asked_for(path, monkeypatch, dtype):
    asked = []

    def open_saved(path, **options):
        asked.append(options)
        return open_model(path, dtype=options["dtype"])

    monkeypatch.setattr(distillation, "open_model", open_saved)
    options = {"checkpoint": 5, "ema": True, "average": 3}
    teacher = create_teacher(3, CLASSES, dtype, teacher=path, **options)
    assert asked == [options | {"dtype": dtype}]
    logits = jax.eval_shape(
        lambda images: merge(teacher.graphdef, teacher.variables).stem_output(images),
        jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32),
    )
    assert logits.dtype == dtype


def test_a_run_stays_at_the_checkpoint_of_its_teacher(tmp_path):
    (tmp_path / "run" / "checkpoints" / "6").mkdir(parents=True)
    assert newest_checkpoint(str(tmp_path / "run")) == 6
    (tmp_path / "run" / "checkpoints" / "11").mkdir()
    assert newest_checkpoint(str(tmp_path / "run")) == 11
    for nothing in (None, "", 3, str(tmp_path), str(tmp_path / "none")):
        assert newest_checkpoint(nothing) is None


def test_hosts_compare_the_weights_of_the_teacher(path, tmp_path):
    teacher = taught(path)
    other = jax.tree.map(lambda x: x + 1, teacher.variables)
    facts = []
    for weights in (teacher.variables, teacher.variables, other, {}):
        parts = types.SimpleNamespace(
            config=ml_collections.ConfigDict(),
            model=small(),
            class_names=CLASSES,
            train_data=[[]],
            num_test_images=0,
            train_step=types.SimpleNamespace(args=((None, weights),)),
        )
        facts.append(loop._facts(parts, tmp_path))
    assert facts[0] == facts[1]
    differing = {name for name in facts[0] if facts[0][name] != facts[2][name]}
    assert differing == {"the SHA-256 of the teacher's weights"}


def test_without_weight_there_is_no_teacher():
    assert taught("/nowhere", weight=0.0) is None
    assert create_teacher(3, CLASSES, None) is None


def test_bad_settings(path, tmp_path):
    for options, message in [
        ({"weight": 1.5}, "distillation: weight=1.5 must be a number from 0 to 1"),
        ({"temperature": 0}, "distillation: temperature=0 must be a number"),
        ({"hard": 1}, "distillation: hard=1 must be True or False"),
        ({"ema": "yes"}, "distillation: ema='yes' must be True or False"),
        ({"ema": True}, "is not a training run, so it has one set of weights only"),
        ({"checkpoint": 3}, "is not a training run, so it has one set of weights only"),
    ]:
        with pytest.raises(ValueError, match=message):
            taught(path, **options)
    with pytest.raises(ValueError, match="teacher='' must be a path or None"):
        taught("")
    with pytest.raises(ValueError, match="distillation: teacher: there is no directory"):
        taught(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="has 3 classes, and the data have 4"):
        create_teacher(4, None, None, teacher=path)
    with pytest.raises(ValueError, match="has a class 'b' where the data have 'x'"):
        create_teacher(3, ["a", "x", "c"], None, teacher=path)
