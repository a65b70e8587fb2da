import re
from pathlib import Path

import pytest

from configs import digits
from slimconv_jax.commands.options import expand_flag_files
from slimconv_jax.data.preprocessing import preprocessing_of
from slimconv_jax.devices import data_mesh
from slimconv_jax.storage.work_directory import flatten
from slimconv_jax.training.config import (
    check_config,
    complete,
    default_values,
    describe_keys,
    read_config,
)
from slimconv_jax.training.setup import create_initial, create_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config():
    return complete(digits.get_config())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_sise", 3, "^config has no key 'batch_sise' .did you mean 'batch_size'.*seed"),
        (
            "model.kk",
            3,
            "^config.model has no key 'kk' .did you mean 'k'.*; its keys are: name, k,",
        ),
        ("dataset.split", "train", "^config.dataset has no key 'split'.*did you mean 'test_split'"),
        ("loader.threads", 3, "^config.loader has no key 'threads'"),
        ("model.rngs", 3, "^config.model has no key 'rngs'"),
        ("optimizer.name", "loin", "config.optimizer.name='loin' must be one of 'acprop', "),
        (
            "optimizer.name",
            "lion",
            "optimizer.momentum: lion has no momentum; it has b1, b2",
        ),
        ("optimizer.total_steps", 3, "^config.optimizer has no key 'total_steps'"),
        ("batch_size", 100, "batch_size=100 does not divide over 8 devices; .*multiple of 8"),
        ("step.accumulation_steps", 3, "64 does not divide over 8 devices, each in 3 parts; .* 24"),
        ("step.accumulation_steps", 0, "accumulation_steps=0 must be an integer >= 1"),
        ("step.mesh", 3, "^config.step has no key 'mesh'"),
        ("optimizer.learning_rate_fn", 3, "^config.optimizer has no key 'learning_rate_fn'"),
        ("init_from", 3, "init_from=3 must be a path or None"),
        ("profile_steps", -1, "profile_steps=-1 must be an integer >= 0"),
        ("seed", 2**32, "seed=4294967296 must be an integer from 0 to 4294967295"),
        ("batch_size", 0, "batch_size=0 must be an integer >= 1"),
        ("batch_size", 8.0, "batch_size=8.0 must be an integer >= 1"),
        ("num_epochs", True, "num_epochs=True must be an integer >= 1"),
        ("augment", 4, "config.augment must be a section"),
    ],
)
def test_bad_configs(config, key, value, message):
    *sections, key = key.split(".")
    where = config
    for section in sections:
        where = where[section]
    with where.ignore_type():
        where[key] = value
    with pytest.raises(ValueError, match=message):
        check_config(config, num_devices=8)


@pytest.mark.parametrize("key", ["num_epochs", "optimizer.learning_rate", "model.name"])
def test_missing_keys(key):
    config = digits.get_config()
    *sections, name = key.split(".")
    where = config
    for section in sections:
        where = where[section]
    del where[name]
    with pytest.raises(ValueError, match=rf"lacks config\.{re.escape(key)}; --help-config lists"):
        check_config(complete(config), num_devices=1)


def test_what_has_a_default_may_be_left_out():
    config = digits.get_config()
    del config["augment"], config.model["width"], config["log_every_steps"]
    whole = complete(config)
    check_config(whole, num_devices=1)
    assert "augment" not in config  # it is as it was
    assert (whole.augment.flip, whole.model.width, whole.log_every_steps) == (False, 64, 100)
    assert whole.step.accumulation_steps == 1 and whole.init_from is None


def test_every_key_can_be_set_on_the_command_line():
    """Also those that the file does not mention, with the type of their annotation; and None."""
    config = read_config(
        "digits",
        [
            *("--config.augment.mixup_alpha=0.2", "--config.augment.flip", "--config.seed=3"),
            *("--config.optimizer.clip_norm=1", "--config.loader.num_threads", "2"),
            *("--config.transform.scale=(0.5, 1.0)", "--config.loader.on_device=false"),
            *("--config.init_from=a b", "--config.model.dtype=bfloat16", "--config.model.k=None"),
            *("--config.dataset.data_dir=None", "--config.checkpoint_every_minutes=5"),
        ],
    )
    assert (config.augment.mixup_alpha, config.augment.flip, config.seed) == (0.2, True, 3)
    assert (config.optimizer.clip_norm, config.loader.num_threads) == (1.0, 2)
    assert (config.transform.scale, config.loader.on_device) == ((0.5, 1.0), False)
    assert (config.init_from, config.model.dtype, config.model.k) == ("a b", "bfloat16", None)
    assert (config.dataset.data_dir, config.checkpoint_every_minutes) == (None, 5.0)


def test_an_optimizer_brings_its_arguments():
    """They are keys as soon as it has the name, in the file or on the command line."""
    nothing = ["--config.optimizer.momentum=None", "--config.optimizer.nesterov=None"]
    for name in (["--config.optimizer.name=muon"], ["--config.optimizer.name", "muon"]):
        arguments = [
            "--config.optimizer.ns_steps=4",
            "--config.optimizer.adaptive",
            *name,
            *nothing,
        ]
        config = read_config("digits", arguments)
        assert config.optimizer.ns_steps == 4 and config.optimizer.adaptive is True
        check_config(config, num_devices=1)
    assert (
        "\n".join(describe_keys(config, 99)).count("\n    Number of Newton-schulz iterations") == 1
    )
    with pytest.raises(ValueError, match="no key 'ns_steps'"):
        read_config("digits", ["--config.optimizer.ns_steps=4"])
    with pytest.raises(ValueError, match=r"optimizer.b1: sgd has no b1; it has momentum, nest"):
        config = digits.get_config()
        config.optimizer.b1 = 0.9
        check_config(complete(config), num_devices=1)


def test_tests_have_a_size_of_their_own():
    arguments = ["name=synthetic", "num_examples=8", "num_classes=3", "image_size=24"]
    arguments = [f"--config.dataset.{text}" for text in (*arguments, "train_split=train")]
    sizes = ["image_size=16", "test_size=20", "crop_ratio=1.0"]
    arguments += [f"--config.transform.{text}" for text in sizes]
    more = ["--config.batch_size=8", "--config.model.width=4", "--config.dataset.test_split=test"]
    parts = create_parts(read_config("digits", [*arguments, *more]), data_mesh())
    assert parts.train_data[0].image_shape == (16, 16, 3)
    assert parts.test_data.image_shape == (20, 20, 3)
    preprocessing = preprocessing_of(parts.info())
    assert (preprocessing.image_size, preprocessing.crop_ratio) == (20, 1.0)
    assert str(preprocessing).startswith("shorter side to 20, centre of 20 pixels; mean (")
    with pytest.raises(ValueError, match="crop_ratio=0 must be a number"):
        preprocessing_of({"preprocessing": {"crop_ratio": 0}})


def test_frozen_statistics_need_a_trained_model():
    config = read_config("digits", ["--config.step.batch_norm=frozen", "--config.model.width=8"])
    with pytest.raises(ValueError, match=r"needs the statistics .*: set config\.init_from, or"):
        create_initial(config, num_classes=10)


def test_a_name_is_not_a_config():
    with pytest.raises(ValueError, match="a config is a ConfigDict, as read_config returns"):
        complete("digits")


@pytest.mark.parametrize(
    "overrides",
    [
        ["--config.model.k"],
        ["--config.model.k", "--config.model.k=None", "--config.seed=7"],
        ["--config.dataset.data_dir", "--config.model.k=8/3"],
        ["--config.batch_size", "--config.normalize.mean=(0, 0, 0)"],
    ],
)
def test_a_value_that_is_missing(overrides):
    with pytest.raises(ValueError, match=f"{re.escape(overrides[0])} needs a value"):
        read_config("digits", overrides)


@pytest.mark.parametrize("key", ["normalize.mean[0]", "model.name[0]"])
def test_an_element_of_a_value_cannot_be_set(key):
    with pytest.raises(ValueError, match="digits cannot be changed like this: 0 is not a valid"):
        read_config("digits", [f"--config.{key}=0.5"])


def test_every_key_is_described():
    lines = list(describe_keys(read_config("digits", ["--config.model.k=8/3"]), width=80))
    assert all(len(line) <= 80 for text in lines for line in text.splitlines() if "= " not in line)
    text = "\n".join(lines)
    assert (
        "config.model.k = '8/3'  (default: None)\n    compression ratio of every SlimConv" in text
    )
    keys_said = re.findall(r"^config\.(\S+) = .*\n    \S", text, re.MULTILINE)
    flat = flatten(default_values())
    assert set(keys_said) == flat.keys()  # each with its meaning


def test_a_config_is_found_by_its_name():
    by_path = read_config("configs/imagenet.py:sc_resnet101", ["--config.model.k=8/3"])
    assert (
        by_path.to_dict()
        == read_config("imagenet:sc_resnet101", ["--config.model.k=8/3"]).to_dict()
    )
    assert by_path.model.name == "sc_resnet101"
    with pytest.raises(ValueError, match=r"is not there; those that come .*: cifar100, "):
        read_config("imagenett")
    with pytest.raises(ValueError, match=r"is a directory, not a config file"):
        read_config("configs")


def flags(file, *more):
    return expand_flag_files([f"--flagfile={file}", *more])


def test_a_config_is_called_with_its_argument_and_changed_by_files(tmp_path):
    text = (ROOT / "configs/digits.py").read_text()
    text = text.replace("def get_config()", "def get_config(epochs='7')")
    text = text.replace("config.num_epochs = 20", "config.num_epochs = int(epochs)")
    (tmp_path / "mine.py").write_text(text)
    path = tmp_path / "mine.py"
    assert read_config(path, []).num_epochs == 7
    assert read_config(f"{path}:3", ["--config.seed=2"]).num_epochs == 3
    (tmp_path / "flags").write_text("--config.seed=5\n--config.optimizer.warmup_epochs=None\n")
    config = read_config(path, flags(tmp_path / "flags", "--config.model.k", "None"))
    assert (config.seed, config.optimizer.warmup_epochs, config.model.k) == (5, None, None)
    (tmp_path / "flags").write_text("--config.sed=5\n")
    with pytest.raises(ValueError, match="config has no key 'sed'"):
        read_config(path, flags(tmp_path / "flags"))
    with pytest.raises(ValueError, match=r"the file of --flagfile cannot be read: .*nowhere"):
        read_config(path, flags(tmp_path / "nowhere"))
    (tmp_path / "flags").write_bytes(b"\xef\xbb\xbf--config.seed=6\n--config.model.k=None\n")
    config = read_config(path, flags(tmp_path / "flags", "--config.model.k=8/3"))
    assert (config.seed, config.model.k) == (6, "8/3")
    with pytest.raises(ValueError, match=r"config.normalize.mean\[7\] cannot be None"):
        read_config(path, ["--config.normalize.mean[7]=None"])
    with pytest.raises(ValueError, match=r"mine.py cannot be used: ValueError: invalid literal"):
        read_config(f"{path}:x", [])
    # A switch takes no value, and what follows is another override.
    config = read_config(path, ["--config.model.zero_init_residual", "--config.init_from=None"])
    assert config.model.zero_init_residual is True and config.init_from is None


def test_a_config_is_read_as_train_reads_it(tmp_path):
    config = read_config(ROOT / "configs/digits.py", ["--config.model.k=8/3"])
    assert config.model.k == "8/3"
    (tmp_path / "broken.py").write_text("def get_config() return 1")
    for path, overrides, message in (
        ("none.py", [], "the config .*/none.py is not there; those that come with .* digits, "),
        (tmp_path / "broken.py", [], f"the config file {tmp_path / 'broken.py'} cannot be used: "),
        (ROOT / "configs/digits.py", ["--config.model.nam=2"], "did you mean 'name'"),
        (ROOT / "configs/digits.py", ["--config.batch_size=x"], "batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(path, overrides)
