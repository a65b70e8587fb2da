import contextlib
import json
import resource
import struct
import threading

import jax.numpy as jnp
import ml_collections
import PIL.Image
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from slimconv_jax.errors import InputError
from slimconv_jax.training import window
from slimconv_jax.training.interruption import RunInterruptedError
from slimconv_jax.training.loggers import LOGGERS, Loggers
from slimconv_jax.training.metrics import rank_evaluations, read_metrics
from slimconv_jax.training.report import Reporter
from slimconv_jax.training.timetable import Phase, Timetable

ONE_PHASE = (Phase(4),)


def reporter(workdir, first_step=0, *, phases=ONE_PHASE):
    return Reporter(
        epath.Path(workdir),
        Timetable(10, phases, 10, frozenset({10}), frozenset({5, 10})),
        ml_collections.ConfigDict(
            {"batch_size": 4, "log_every_steps": 4, "loggers": ("tensorboard",)}
        ),
        title="a model",
        first_step=first_step,
    )


def metrics(step):
    values = {"loss": step, "accuracy": 0.5, "grad_norm": 2.0, "learning_rate": 0.1}
    return {key: jnp.float32(value) for key, value in values.items()}


def result(top1=0.5, loss=1.5):
    return {"loss": loss, "top1": top1, "top5": 0.75, "correct": 2, "examples": 4}


def test_lines_average_over_the_steps_since_the_last_one(tmp_path, capsys):
    with reporter(tmp_path) as report:
        for step in range(1, 11):
            report.train_step(step, metrics(step), 0.0)
            if step == 5:
                report.test(step, {"test": result(), "test_ema": result(0.25)})
    lines = read_metrics(epath.Path(tmp_path))
    assert [(line["split"], line["step"], line["loss"]) for line in lines] == [
        ("train", 4, 2.5),
        ("train", 5, 5.0),
        ("test", 5, 1.5),
        ("test_ema", 5, 1.5),
        ("train", 8, 7.0),
        ("train", 10, 9.5),
    ]
    assert lines[0]["epoch"] == 1.6
    assert all(line["images_per_second"] > 0 for line in lines if line["split"] == "train")
    assert lines[2] == {"epoch": 2.0, "step": 5, "split": "test", **result()}
    assert lines == report.lines
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6  # no terminal: no bar, but lines
    assert printed[2] == "step  5/10  epoch 2.0  test     loss 1.5000  top-1 50.00%  top-5 75.00%"
    assert printed[3] == "step  5/10  epoch 2.0  averaged loss 1.5000  top-1 25.00%  top-5 75.00%"
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1320, 480)


def test_tensorboard_gets_the_same_numbers_and_forgets_what_was_not_saved(tmp_path):
    for first_step, loss in ((0, 1), (5, 100)):  # killed after step 8, continued after step 5
        with reporter(tmp_path, first_step) as report:
            for step in range(first_step + 1, 9):
                report.train_step(step, metrics(loss * step), 0.0)
            report.test(8, {"test": result()})
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.suffix)
    events = [event for file in files for event in read_events(file)]
    values = {}
    for event in events:
        if event.HasField("session_log"):  # TensorBoard drops what it has from there on
            assert event.step == 6
            values = {key: value for key, value in values.items() if key[1] < event.step}
        for value in event.summary.value:
            values[value.tag, event.step] = value.simple_value
    assert values["train/loss", 4] == 2.5 and values["train/loss", 5] == 5.0
    assert values["train/loss", 8] == 700.0
    assert values["test/top1", 8] == 0.5
    assert {tag for tag, _ in values} >= {"train/learning_rate", "train/images_per_second"}


def read_events(file):
    """The events of a TensorBoard file: length, its checksum, an event, its checksum, and so on."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[12 + length + 4 :]


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


DAMAGED = {
    "cut": b'{"epoch": 1.6, "step": 4, "sp\n',
    "key": b'{"Epoch": 1.6, "step": 4, "split": "train", "loss": 1, "accuracy": 1}\n',
    "split": b'{"epoch": 1.6, "step": 4, "split": "other", "loss": 1, "accuracy": 1}\n',
    "text": b'{"epoch": 1.6, "step": 4, "split": "train", "loss": "1", "accuracy": 1}\n',
    "nan": b'{"epoch": 1.6, "step": 4, "split": "train", "loss": NaN, "accuracy": 1}\n',
    "list": b"[]\n",
    "deep": b"[" * 50_000 + b"\n",
    "long": b" " * 200_000 + b"\n",
    "bytes": b"\xff\x00\n",
    "empty": b"\n",
    "huge": b'{"step": 5, "epoch": 2, "split": "train", "loss": 1, "accuracy": 0, "grad_norm": 1'
    + b', "learning_rate": 1, "images_per_second": 1'
    + b"0" * 400
    + b"}\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_left_out_and_the_file_is_kept(tmp_path, damage, capsys):
    with reporter(tmp_path) as report:
        for step in range(1, 11):
            report.train_step(step, metrics(step), 0.0)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    content = lines[0] + DAMAGED[damage] + b"".join(lines[1:])
    for copy in ("damaged-metrics.jsonl", "damaged-metrics.jsonl.1"):
        path.write_bytes(content)
        capsys.readouterr()
        with reporter(tmp_path, first_step=10) as report:
            assert [line["step"] for line in report.lines] == [4, 5, 8, 10]
        assert path.read_bytes() == b"".join(lines)
        assert (tmp_path / copy).read_bytes() == content
        words = capsys.readouterr().out
        assert words.startswith("warning: line")
        assert f" damaged in {path}; the run continues without" in words
        assert words.endswith(f"and the old file is now {tmp_path / copy}\n")
        assert "line 2 is" in words or damage == "long"  # which counts as several


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_training_that_diverges_ends_with_the_step(tmp_path, name):
    def calls():
        with reporter(tmp_path) as report:
            for step in range(1, 11):
                value = {name: jnp.float32("nan")} if step >= 3 else {}
                report.train_step(step, metrics(step) | value, 0.0)

    with pytest.raises(
        ValueError, match=rf"the {name} is nan at step 3: .* diverged; no checkpoint was"
    ):
        calls()


def test_an_evaluation_that_is_not_finite_ends_the_run_too(tmp_path):
    with reporter(tmp_path) as report:
        report.train_step(1, metrics(1), 0.0)
        with pytest.raises(ValueError, match="the test loss is inf at step 1"):
            report.test(1, {"test": result(loss=float("inf"))})
    assert read_metrics(epath.Path(tmp_path)) == []


def test_a_thread_that_is_told_to_exit_ends_the_run_and_nobody_hangs(tmp_path, monkeypatch):
    def leave(*_):
        raise SystemExit(1)  # as libraries do that cannot print

    monkeypatch.setattr(Reporter, "_print", leave)
    with pytest.raises(SystemExit), reporter(tmp_path) as report:
        for step in range(1, 11):
            report.train_step(step, metrics(step), 0.0)


def test_who_says_stop_twice_does_not_wait_for_the_devices(tmp_path):
    class Never:
        def item(self):
            devices.wait()

    devices = threading.Event()
    with pytest.raises(KeyboardInterrupt), reporter(tmp_path) as report:
        report.train_step(1, {"loss": Never()}, 0.0)
        raise KeyboardInterrupt
    devices.set()


@pytest.mark.parametrize("what", ["metrics.jsonl", "curves.png.part"])
def test_files_that_cannot_be_written_are_a_sentence_and_nobody_hangs(tmp_path, what):
    def calls():
        with reporter(tmp_path) as report:
            (tmp_path / what).unlink(missing_ok=True)
            (tmp_path / what / "in").mkdir(parents=True)  # stands in the way even of root
            for step in range(1, 11):
                report.train_step(step, metrics(step), 0.0)
                report.test(step, {"test": result()})

    with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: "):
        calls()


def test_a_full_disk_is_a_sentence_and_nobody_hangs(tmp_path):
    # TensorBoard's file is the first to grow beyond what can be written.
    def calls():
        with reporter(tmp_path) as report:
            for step in range(1, 11):
                report.train_step(step, metrics(step), 0.0)
                report.wait()
                report.test(step, {"test": result()})

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: .*too large"):
            calls()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' * 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: .*too large"):
            reporter(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_run_that_stops_between_lines_writes_one(tmp_path):
    for first_step, last_step in ((0, 2), (2, 4)):
        with reporter(tmp_path, first_step) as report:
            for step in range(first_step + 1, last_step + 1):
                report.train_step(step, metrics(step), 0.0)
            report.flush(last_step)
    lines = read_metrics(epath.Path(tmp_path))
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 1.5), (4, 3.5)]


def test_the_time_of_compiling_for_another_size_is_left_out(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 100.0, 101.0, 102.0])  # the arrivals of steps 1 to 6
    monkeypatch.setattr(window.time, "perf_counter", lambda: next(clock))
    phases = (Phase(8), Phase(4, first_step=3, first_epoch=2))
    with reporter(tmp_path, phases=phases) as report:
        for step in range(1, 7):
            report.train_step(step, metrics(step), 0.0)
        report.flush(6)
        (first, second, third) = read_metrics(epath.Path(tmp_path))
    assert [line["step"] for line in (first, second, third)] == [4, 5, 6]
    assert first["images_per_second"] == 8  # of steps 2 and 3
    assert second["images_per_second"] == third["images_per_second"] == 4


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (InputError("x"), 1), (KeyError("x"), 1), (RunInterruptedError("SIGTERM", 5), 143)],
)
def test_loggers_hear_how_a_run_ends(tmp_path, monkeypatch, error, status):
    ends = []

    class Logger:
        def close(self, status):
            ends.append(status)

    monkeypatch.setitem(LOGGERS, "tensorboard", (lambda run: Logger(), "json"))
    with pytest.raises(type(error)) if error else contextlib.nullcontext(), reporter(tmp_path):
        if error:
            raise error
    assert ends == [status]


def test_loggers_hear_of_training_that_diverges(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(Loggers, "close", lambda self, status: ends.append(status))
    with pytest.raises(ValueError, match="the training diverged"), reporter(tmp_path) as report:
        report.train_step(1, metrics(float("nan")), 0.0)
    assert ends == [1]


def test_the_best_evaluation():
    def line(step, split, top1, loss=1.0):
        return {"step": step, "split": split, "top1": top1, "loss": loss}

    tests = [line(1, "test", 0.5), line(2, "test", 0.7), line(3, "test", 0.7), line(4, "train", 1)]

    def steps(*lines):
        return [line["step"] for line in rank_evaluations(lines)]

    assert steps() == []
    assert steps(*tests) == [2, 3, 1]
    assert steps(*tests, line(5, "test", 0.7, 0.9)) == [5, 2, 3, 1]
    assert steps(*tests, line(6, "test_ema", 0.8)) == [6, 2, 3, 1]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(epath.Path(tmp_path)) == []
