"""What version 0.1 wrote opens in this one: a run that was stopped, and a converted model."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from slimconv_jax import load_model
from slimconv_jax.inference.evaluate import evaluate
from slimconv_jax.inference.saved import open_model
from slimconv_jax.storage.model_directory import read_info
from slimconv_jax.training.config import read_config
from slimconv_jax.training.loop import train

FILES = Path(__file__).parent / "files" / "version_0_1.tar.xz"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(FILES) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_models_have_the_weights_that_were_saved(old):
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with np.load(old / "logits.npz") as logits:
        for name, directory, options in (
            ("model", "run", {}),
            ("ema", "run", {"ema": True}),
            ("converted", "converted", {}),
        ):
            model = load_model(old / directory, **options)
            found = jax.jit(lambda images, model=model: model(images))(images)
            np.testing.assert_allclose(found, logits[name], rtol=0, atol=1e-5)
    assert read_info(old / "converted")["source"]["file"] == "c.pth"
    assert open_model(old / "run").class_names == list("0123456789")


@pytest.mark.long
def test_a_run_is_evaluated_and_continues_to_the_same_end(old):
    text = (old / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    expected = {(line["step"], line["split"]): line for line in lines}
    assert evaluate(old / "run")["correct"] == expected[6, "test"]["correct"]

    changes = ("model.width=4", "batch_size=256", "eval_batch_size=384", "num_epochs=2")
    more = ("eval_every_epochs=1", "step.ema_decay=0.9")
    config = read_config("digits", [f"--config.{change}" for change in (*changes, *more)])
    result = train(config, old / "run", devices=jax.devices()[:1])
    assert result["step"] == 11
    assert result["loss"] == pytest.approx(expected[11, "test"]["loss"], rel=1e-2)
    written = json.loads((old / "run" / "config.json").read_text())
    assert written["checkpoint_every_steps"] == 0  # a key that version 0.1 did not know
