"""Sc-ResNet-50 on noise, for measuring how fast a machine trains.

    python train.py --config synthetic

There is nothing to learn and hardly anything to load: the images are kept on the devices. To
expect: images per second in the progress, no accuracy. --config.profile_steps=5 writes a trace.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.name = "sc_resnet50"
    config.model.k = "4/3"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32

    config.dataset = ConfigDict()
    config.dataset.name = "synthetic"  # with --config.dataset.image_size=64 for smaller images
    config.normalize = ConfigDict()
    config.normalize.mean = (0.485, 0.456, 0.406)
    config.normalize.std = (0.229, 0.224, 0.225)
    config.augment = ConfigDict()
    config.augment.flip = True

    config.batch_size = 256  # on all devices together
    config.num_epochs = 20

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_epochs = 1.0

    config.eval_every_epochs = 20
    config.log_every_steps = 5
    config.checkpoints_to_keep = 1
    return config
