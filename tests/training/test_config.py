import pytest
from ml_collections import ConfigDict

from configs import digits
from slimconv_jax.training.config import check_config


@pytest.fixture
def config():
    return digits.get_config()


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


@pytest.mark.parametrize(
    "key", ["seed", "init_from", "model", "optimizer.learning_rate", "model.name"]
)
def test_missing_keys(config, key):
    *sections, key = key.split(".")
    where = config
    for section in sections:
        where = where[section]
    del where[key]
    with pytest.raises(ValueError, match=f"lacks the key '{key}'"):
        check_config(config, num_devices=1)


def test_keys_with_a_default_may_be_left_out(config):
    config.augment = ConfigDict()
    del config.model["width"]
    check_config(config, num_devices=1)
