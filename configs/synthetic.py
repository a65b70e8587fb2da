"""Sc-ResNet-50 on noise, for measuring how fast a machine trains.

    python train.py --config configs/synthetic.py

There is nothing to learn and hardly anything to load: the images are kept on the devices. To
expect: images per second in the progress, no accuracy. --config.profile_steps=5 writes a trace.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)

    config.model = ConfigDict()
    config.model.name = "sc_resnet50"
    config.model.k = "4/3"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.remat = False

    config.dataset = ConfigDict()
    config.dataset.name = "synthetic"
    config.dataset.num_examples = 1280
    config.dataset.num_classes = 1000
    config.dataset.image_size = 224
    config.transform = ConfigDict()
    config.loader = ConfigDict()
    config.normalize = ConfigDict()
    config.normalize.mean = (0.485, 0.456, 0.406)
    config.normalize.std = (0.229, 0.224, 0.225)
    config.augment = ConfigDict()
    config.augment.flip = True

    config.batch_size = 256  # on all devices together
    config.eval_batch_size = 256
    config.num_epochs = 20

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_epochs = 1.0

    config.step = ConfigDict()
    config.step.accumulation_steps = 1
    config.step.batch_norm = "global"
    config.step.ema_decay = 0.0

    config.eval_every_epochs = 20
    config.log_every_steps = 5
    config.checkpoints_to_keep = 1
    config.profile_steps = 0
    return config
