"""Sc-ResNet-50 on your own photos, in directories named after their classes.

    python train.py --config configs/image_folder.py --config.dataset.data_dir=ROOT

ROOT/train/CLASS/ and ROOT/val/CLASS/ hold the images, of any size. Training takes random crops,
resized to 224x224 pixels; testing resizes the shorter side to 256 and takes the central 224.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.init_from = config_dict.placeholder(str)  # a saved model to start from

    config.model = ConfigDict()
    config.model.name = "sc_resnet50"
    config.model.k = "4/3"
    config.model.zero_init_residual = True
    config.model.dtype = config_dict.placeholder(str)  # "bfloat16" on accelerators

    config.dataset = ConfigDict()
    config.dataset.name = "image_folder"
    config.dataset.data_dir = config_dict.placeholder(str)
    config.dataset.train_split = "train"
    config.dataset.test_split = "val"
    config.transform = ConfigDict()
    config.transform.image_size = 224
    config.transform.scale = (0.08, 1.0)  # of a random crop's area
    config.transform.ratio = (3 / 4, 4 / 3)  # of its width to its height
    config.loader = ConfigDict()
    config.loader.on_error = "raise"  # "skip" leaves out what cannot be decoded
    config.loader.num_threads = config_dict.placeholder(int)  # one a core
    config.normalize = ConfigDict()
    config.normalize.mean = (0.485, 0.456, 0.406)
    config.normalize.std = (0.229, 0.224, 0.225)
    config.augment = ConfigDict()
    config.augment.flip = True

    config.batch_size = 256
    config.eval_batch_size = 256
    config.num_epochs = 100

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 5.0  # then a cosine down to 0

    config.step = ConfigDict()
    config.step.ema_decay = 0.0  # 0.99, say, to evaluate averaged weights too

    config.eval_every_epochs = 1  # a checkpoint goes with every evaluation
    config.log_every_steps = 50
    config.checkpoints_to_keep = 2  # and the best
    config.profile_steps = 0
    return config
