"""A narrow Sc-ResNet-14 on CIFAR-100, a few epochs, for machines without an accelerator.

    python train.py --config cifar100_small --config.dataset.data_dir=DIR

DIR is where TensorFlow Datasets keeps its data sets, by default ~/tensorflow_datasets. The
images stay as they are, 32x32, so they are kept on the devices. The "imagenet" stem, of stride 4,
brings them down to 8x8, where a CPU can train on them. To expect: top-1 of about 33 % after
eight to fourteen minutes on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.name = "sc_resnet14"
    config.model.k = "4/3"
    config.model.width = 32
    config.model.zero_init_residual = True

    config.dataset = ConfigDict()
    config.dataset.name = "tfds/cifar100"
    config.normalize = ConfigDict()
    config.normalize.mean = (0.5071, 0.4865, 0.4409)
    config.normalize.std = (0.2673, 0.2564, 0.2762)
    config.augment = ConfigDict()
    config.augment.crop_padding = 4
    config.augment.flip = True

    config.batch_size = 128
    config.eval_batch_size = 500
    config.num_epochs = 6

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.2
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.warmup_epochs = 1.0  # then a cosine down to 0
    return config
