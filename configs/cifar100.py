r"""Any model of `slimconv list` on CIFAR-100, the data of the paper's figure of compression.

    python train.py --config cifar100:sc_resnet50
    python train.py --config cifar100:sc_resnet50 --config.model.k=8/3 --workdir runs/k8_3
    python train.py --config cifar100:resnet50
    python train.py --config cifar100:sc_resnet50,modern

Published, as points of a figure: top-1 of 78.5 % at k=4/3, 77.6 at 2, 78.1 at 8/3, 76.2 at 10/3,
75.9 at 4, 76.3 at 14/3 and 75.4 at 16/3; ResNet-50 has 77.1. The recipe behind it is not published;
this is the usual one for that baseline. ",modern" adds what makes images harder and fits longer
trainings: TrivialAugment, random erasing, mixup and CutMix, label smoothing, stochastic depth.

Add --config.dataset.data_dir=DIR where TensorFlow Datasets keeps CIFAR-100 elsewhere than by
default.
"""

from ml_collections import ConfigDict

MODERN = {
    "augment.trivialaugment_wide": True,
    "augment.erase_probability": 0.25,
    "augment.mixup_alpha": 0.2,
    "augment.cutmix_alpha": 1.0,
    "step.label_smoothing": 0.1,
    "step.drop_path_rate": 0.05,
}


def get_config(argument: str = "sc_resnet50") -> ConfigDict:
    name, _, recipe = argument.partition(",")
    if recipe not in ("", "modern"):
        raise ValueError(f"there is no recipe {recipe!r}; there is modern")
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.name = name
    config.model.stem = "cifar"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32

    config.dataset = ConfigDict()
    config.dataset.name = "tfds/cifar100"
    config.normalize = ConfigDict()  # the images stay as they are, on the devices
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
    config.optimizer.schedule = "multistep"
    config.optimizer.milestones = (60, 120, 160)  # epochs
    config.optimizer.decay_factor = 0.2

    config.step = ConfigDict()
    config.update_from_flattened_dict(MODERN if recipe else {})
    return config
