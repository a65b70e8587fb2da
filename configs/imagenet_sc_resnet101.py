"""Sc-ResNet-101 on ImageNet.

    python train.py --config configs/imagenet_sc_resnet101.py

Published: top-1 77.84 % (27.96 M parameters; 4.82 G multiply-adds as counted here).

ImageNet is read from TensorFlow Datasets; add --config.dataset.data_dir=DIR where it is kept
elsewhere than by default. For a directory of JPEGs add --config.dataset.name=image_folder
--config.dataset.data_dir=ROOT --config.dataset.test_split=val.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # a saved model to start from

    config.model = ConfigDict()
    config.model.name = "sc_resnet101"
    config.model.k = "4/3"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.remat = False  # True where the memory is short

    config.dataset = ConfigDict()
    config.dataset.name = "tfds/imagenet2012"
    config.dataset.data_dir = config_dict.placeholder(str)
    config.dataset.train_split = "train"
    config.dataset.test_split = "validation"
    config.transform = ConfigDict()
    config.transform.image_size = 224
    config.transform.scale = (0.08, 1.0)  # of a random crop's area
    config.transform.ratio = (3 / 4, 4 / 3)  # of its width to its height
    config.loader = ConfigDict()
    config.loader.on_error = "raise"
    config.loader.num_threads = config_dict.placeholder(int)  # one a core
    config.normalize = ConfigDict()
    config.normalize.mean = (0.485, 0.456, 0.406)
    config.normalize.std = (0.229, 0.224, 0.225)
    config.augment = ConfigDict()
    config.augment.flip = True

    config.batch_size = 256  # on all devices together
    config.eval_batch_size = 256
    config.num_epochs = 100

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.weight_decay_on = "all"  # as PyTorch does it
    config.optimizer.learning_rate = 0.1
    config.optimizer.base_batch_size = 256  # what the rate is for; it grows with the batch
    config.optimizer.warmup_epochs = 0.0  # 5 with batches above 1024
    config.optimizer.schedule = "multistep"
    config.optimizer.milestones = (30, 60, 90)  # epochs
    config.optimizer.decay_factor = 0.1

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
