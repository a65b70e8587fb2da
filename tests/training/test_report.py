import json

import jax.numpy as jnp
import pytest
from etils import epath

from slimconv_jax.training.report import MAX_PENDING, Reporter, read_metrics


def reporter(workdir, first_step=0):
    return Reporter(
        epath.Path(workdir),
        first_step=first_step,
        total_steps=10,
        steps_per_epoch=2.5,
        batch_size=4,
        log_every_steps=4,
        eval_steps={5, 10},
    )


def metrics(step):
    return {"loss": jnp.float32(step), "accuracy": jnp.float32(0.5)}


TOTALS = {
    "loss": jnp.float32(6),
    "top1": jnp.int32(2),
    "top5": jnp.int32(3),
    "examples": jnp.int32(4),
}


def test_lines_average_over_the_steps_since_the_last_one(tmp_path, capsys):
    with reporter(tmp_path) as report:
        for step in range(1, 11):
            report.train_step(step, metrics(step), 0.0)
            if step == 5:
                report.test(step, TOTALS)
    lines = read_metrics(epath.Path(tmp_path))
    assert [(line["split"], line["step"], line["loss"]) for line in lines] == [
        ("train", 4, 2.5),
        ("train", 5, 5.0),
        ("test", 5, 1.5),
        ("train", 8, 7.0),
        ("train", 10, 9.5),
    ]
    assert lines[0]["epoch"] == 1.6
    assert all(line["images_per_second"] > 0 for line in lines if line["split"] == "train")
    assert report.evaluation == {
        "step": 5,
        "split": "test",
        "loss": 1.5,
        "top1": 0.5,
        "top5": 0.75,
        "correct": 2,
        "correct_top5": 3,
        "examples": 4,
    }
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5  # no terminal: no bar, but lines
    assert printed[2] == "step  5/10  epoch 2.0  test  loss 1.5000  top-1 50.00%  top-5 75.00%"


def test_a_run_that_continues_keeps_only_what_its_checkpoint_knows(tmp_path):
    with reporter(tmp_path) as report:
        for step in range(1, 11):
            report.train_step(step, metrics(step), 0.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 10, "cut o')  # killed while writing
    with reporter(tmp_path, first_step=5) as report:
        for step in range(6, 11):
            report.train_step(step, metrics(2 * step), 0.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (4, 2.5),
        (5, 5.0),
        (8, 14.0),
        (10, 19.0),
    ]


def test_what_goes_wrong_in_the_thread_is_raised_and_nobody_hangs(tmp_path):
    def calls():
        with reporter(tmp_path) as report:
            report._file.close()  # as good as a full disk: writing fails
            for _ in range(10 * MAX_PENDING):
                report.test(1, TOTALS)

    with pytest.raises(ValueError, match="closed file"):
        calls()


def test_no_metrics_yet(tmp_path):
    assert read_metrics(epath.Path(tmp_path)) == []
