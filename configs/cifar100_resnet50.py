"""ResNet-50 on CIFAR-100, the baseline of the Sc-ResNets.

    python train.py --config configs/cifar100_resnet50.py

Published, as a point of a figure: top-1 of 77.1 %. The recipe behind it is not published; this is
the usual one, and that of cifar100_sc_resnet50.py.

Add --config.dataset.data_dir=DIR where TensorFlow Datasets keeps CIFAR-100 elsewhere than by
default.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # a saved model to start from

    config.model = ConfigDict()
    config.model.name = "resnet50"
    config.model.width = 64
    config.model.stem = "cifar"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32

    config.dataset = ConfigDict()
    config.dataset.name = "tfds/cifar100"
    config.dataset.data_dir = config_dict.placeholder(str)
    config.dataset.train_split = "train"
    config.dataset.test_split = "test"
    config.transform = ConfigDict()  # the images stay as they are
    config.loader = ConfigDict()  # and on the devices
    config.normalize = ConfigDict()
    config.normalize.mean = (0.5071, 0.4865, 0.4409)
    config.normalize.std = (0.2673, 0.2564, 0.2762)
    config.augment = ConfigDict()
    config.augment.crop_padding = 4
    config.augment.flip = True

    config.batch_size = 128  # on all devices together
    config.eval_batch_size = 1000
    config.num_epochs = 200

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.weight_decay_on = "all"  # as PyTorch does it
    config.optimizer.learning_rate = 0.1
    config.optimizer.base_batch_size = 128  # what the rate is for; it grows with the batch
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.schedule = "multistep"
    config.optimizer.milestones = (60, 120, 160)  # epochs
    config.optimizer.decay_factor = 0.2

    config.step = ConfigDict()
    config.step.label_smoothing = 0.0
    config.step.accumulation_steps = 1
    config.step.batch_norm = "global"  # over all devices; or "per_device"
    config.step.ema_decay = 0.0

    config.eval_every_epochs = 1  # a checkpoint goes with every evaluation
    config.log_every_steps = 100
    config.checkpoints_to_keep = 2  # and the best
    config.profile_steps = 0
    return config
