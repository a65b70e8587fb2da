"""Services that get the metrics of a run, and none of which can stop it."""

import importlib.util
import threading
import time

import jax
import pytest
from etils import epath
from PIL import Image

from slimconv_jax.training import loggers
from slimconv_jax.training.config import read_config
from slimconv_jax.training.loggers import (
    LOGGERS,
    Detached,
    Loggers,
    RunInfo,
    check_loggers,
    identify,
)
from slimconv_jax.training.loop import train
from slimconv_jax.training.metrics import read_metrics

LINES = [
    {"epoch": 1.0, "step": 5, "split": "train", "loss": 2.5, "accuracy": 0.25},
    {"epoch": 1.0, "step": 5, "split": "test", "loss": 2.0, "top1": 0.5},
    {"epoch": 2.0, "step": 10, "split": "test", "loss": 1.5, "top1": 0.75},
]


class Recorder:
    """A logger that keeps what it gets, and fails or hangs where it is told to."""

    def __init__(self, fails_in=None, waits_in=None):
        self.got, self.status = [], None
        self.fails_in, self.waits_in, self.go_on = fails_in, waits_in, threading.Event()
        self._at("create")

    def _at(self, where):
        if where == self.fails_in:
            raise KeyError(f"no luck in {where}")
        if where == self.waits_in:
            self.go_on.wait()

    def write(self, lines):
        self._at("write")
        self.got += lines

    def close(self, status):
        self._at("close")
        self.status = status


def test_a_logger_gets_everything_in_order(capsys):
    recorder = Recorder()
    detached = Detached("x", lambda: recorder)
    for line in LINES:
        detached.write([line])
    detached.close(0)
    detached.wait(9)
    assert recorder.got == LINES and recorder.status == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("where", ["create", "write", "close"])
def test_one_that_raises_is_given_up(where, capsys):
    detached = Detached("x", lambda: Recorder(fails_in=where))
    for _ in range(3):
        detached.write(LINES)
    detached.close(0)
    detached.wait(9)
    said = f"warning: the logger x failed: 'no luck in {where}'; the run goes on without it\n"
    assert capsys.readouterr().out == said


def test_one_that_hangs_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(loggers, "PATIENCE", 0.1)
    monkeypatch.setattr(loggers, "MOST_PENDING", 3)
    recorder = Recorder(waits_in="write")
    detached = Detached("x", lambda: recorder)
    for _ in range(9):
        detached.write(LINES)
    assert capsys.readouterr().out.startswith("warning: the logger x is 3 writes behind; the run")
    recorder.waits_in = None
    recorder.go_on.set()
    detached.close(0)
    detached.wait(9)
    assert capsys.readouterr().out == ""  # once is enough
    detached._thread.join(9)
    assert len(recorder.got) <= len(LINES) and recorder.status == 1  # what was pending is dropped


def test_one_that_exits_is_given_up(capsys):
    def create():
        raise SystemExit(3)

    detached = Detached("x", create)
    detached.close(0)
    detached.wait(9)
    assert capsys.readouterr().out.startswith("warning: the logger x failed: 3; the run goes on")


def test_starting_loggers_hides_no_module_from_other_threads(run, monkeypatch):
    imported = []
    monkeypatch.setattr(
        loggers, "import_tensorboardx", lambda: imported.append(threading.current_thread())
    )
    monkeypatch.setattr(loggers, "Detached", lambda name, create: imported.append(name))
    Loggers(["tensorboard"], run)
    assert imported == [threading.main_thread(), "tensorboard"]


def test_all_that_hang_have_one_deadline(run, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "PATIENCE", 0.3)
    hanging, waits, wait = [], [], Detached.wait

    def create(run):
        hanging.append(Recorder())
        hanging[-1].waits_in = "close"
        return hanging[-1]

    def waiting(self, seconds):
        waits.append(seconds)
        wait(self, seconds)

    monkeypatch.setattr(Detached, "wait", waiting)
    for name in LOGGERS:
        monkeypatch.setitem(LOGGERS, name, (create, "json"))
    everyone = Loggers(list(LOGGERS), run)
    everyone.write(LINES)
    everyone.close(0)
    assert 0.3 >= waits[0] > waits[1] == waits[2] == 0
    assert capsys.readouterr().out.count("has not finished after 0 s") == len(LOGGERS) == 3
    for recorder in hanging:
        recorder.go_on.set()


@pytest.mark.long
def test_a_run_does_not_mind(tmp_path, monkeypatch, capsys):
    recorder = Recorder()
    monkeypatch.setitem(LOGGERS, "wandb", (lambda run: recorder, "json"))
    monkeypatch.setitem(LOGGERS, "mlflow", (lambda run: Recorder(fails_in="write"), "json"))
    config = read_config("digits", ["--config.num_epochs=1", "--config.model.width=4"])
    config.loggers = ("wandb", "mlflow")
    config.batch_size = 256
    train(config, tmp_path, devices=jax.devices()[:1])
    assert "the logger mlflow failed: 'no luck in write'" in capsys.readouterr().out
    assert recorder.got == read_metrics(epath.Path(tmp_path)) and recorder.status == 0
    assert not (tmp_path / "tensorboard").exists()


def test_unknown_and_missing_loggers(monkeypatch):
    check_loggers(("tensorboard",))
    check_loggers(())
    with pytest.raises(ValueError, match="loggers='comet' must be one of 'tensorboard', 'wandb'"):
        check_loggers(("comet",))
    with pytest.raises(ValueError, match="loggers='wandb' must be a list of tensorboard, wandb"):
        check_loggers("wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs wandb, .* pip install 'slimconv_jax\[wandb\]'"):
        check_loggers(("wandb",))


@pytest.fixture
def run(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "curves.png")
    config = {"model.name": "resnet14", "seed": 3}
    return RunInfo(epath.Path(tmp_path), config, "a model", 0, "a1b2")


def log(name, run, status=0):
    logger = LOGGERS[name][0](run)
    logger.write(LINES[:2])
    logger.write(LINES[2:])
    logger.close(status)


def test_a_run_keeps_its_identity(tmp_path):
    workdir = epath.Path(tmp_path)
    first = identify(workdir, 0)
    assert identify(workdir, 5) == first
    assert identify(workdir, 0) != first  # begun anew
    for damaged in (b"", b"\xff\xfe", b"a'b\n", b"f" * 33):
        (tmp_path / "run_id").write_bytes(damaged)
        with pytest.raises(ValueError, match="run_id is damaged: it has no 32 hexadecimal digits"):
            identify(workdir, 5)


@pytest.mark.process
def test_mlflow_gets_config_metrics_and_curves(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store := f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(store)
    log("mlflow", run, 143)
    (stopped,) = client.search_runs([client.get_experiment_by_name("slimconv_jax").experiment_id])
    assert stopped.info.status == "KILLED"
    log("mlflow", run._replace(first_step=5))  # continued
    (experiment,) = [e for e in client.search_experiments() if e.name == "slimconv_jax"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.params == {"model.name": "resnet14", "seed": "3"}
    assert logged.data.metrics["test/top1"] == 0.75 and logged.info.status == "FINISHED"
    history = client.get_metric_history(logged.info.run_id, "test/loss")
    assert {(m.step, m.value) for m in history} == {(5, 2.0), (10, 1.5)}
    assert [a.path for a in client.list_artifacts(logged.info.run_id)] == ["curves.png"]


@pytest.mark.process
def test_wandb_gets_config_metrics_and_curves(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log("wandb", run)
    (place,) = (tmp_path / "wandb").glob("offline-run-*")
    (images,) = (place / "files/media/images").iterdir()
    assert images.name.startswith("curves")
    (stored,) = place.glob("*.wandb")
    texts = [text.encode() for text in ("model.name", "resnet14", "test/top1", "0.75")]
    for _ in range(200):  # a process of its own writes the file
        if all(text in stored.read_bytes() for text in texts):
            break
        time.sleep(0.1)
    assert all(text in stored.read_bytes() for text in texts)
