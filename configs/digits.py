"""A small Sc-ResNet on handwritten digits: the first run, on any machine.

    python train.py --config digits

The data come with this package: 1437 training and 360 test images of 8x8 pixels, enlarged to
32x32. The "imagenet" stem, of stride 4, brings them back to 8x8. To expect: top-1 of about 99 %
in one to two minutes on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.name = "sc_resnet14"
    config.model.k = "4/3"
    config.model.width = 32

    config.dataset = ConfigDict()
    config.dataset.name = "digits"
    config.normalize = ConfigDict()
    config.normalize.mean = (0.306, 0.306, 0.306)
    config.normalize.std = (0.324, 0.324, 0.324)
    config.augment = ConfigDict()
    config.augment.crop_padding = 2  # no flips: these are digits

    config.batch_size = 64
    config.num_epochs = 20

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.warmup_epochs = 1.0  # then a cosine down to 0

    config.eval_every_epochs = 5  # a checkpoint goes with every evaluation
    config.log_every_steps = 50
    return config
