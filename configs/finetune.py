r"""A converted Sc-ResNet-50 fitted to your own photos, in directories named after their classes.

    python convert_weights.py sc_resnet50.pth.tar sc_resnet50
    python train.py --config finetune --config.init_from=sc_resnet50 \
        --config.dataset.data_dir=ROOT
    python train.py --config finetune:probe --config.init_from=sc_resnet50 \
        --config.dataset.data_dir=ROOT

ROOT/train/CLASS/ and ROOT/val/CLASS/ hold the images, of any size. The classifier is replaced by a
new one for your classes; all else starts from the converted weights, and batch norm keeps the
statistics of its training, since those of small batches of few photos are worse. Training takes
random crops, resized to 224x224 pixels; testing resizes the shorter side to 256 and takes the
central 224. For models of another name, k, width or stem set config.model; without init_from this
trains from scratch, which takes far more epochs and photos, and --config.step.batch_norm=global.

":probe" is a linear probe: it trains the classifier alone, all else stays to the bit.
"""

from ml_collections import ConfigDict


def get_config(recipe: str = "") -> ConfigDict:
    if recipe not in ("", "probe"):
        raise ValueError(f"there is no recipe {recipe!r}; there is probe")
    config = ConfigDict()
    config.model = ConfigDict()
    config.model.name = "sc_resnet50"  # with --config.model.dtype=bfloat16 on accelerators
    config.model.k = "4/3"

    config.dataset = ConfigDict()
    config.dataset.name = "image_folder"
    config.dataset.test_split = "val"
    config.transform = ConfigDict()
    config.transform.image_size = 224
    config.transform.scale = (0.25, 1.0)  # of a random crop's area
    config.normalize = ConfigDict()
    config.normalize.mean = (0.485, 0.456, 0.406)
    config.normalize.std = (0.229, 0.224, 0.225)
    config.augment = ConfigDict()
    config.augment.flip = True

    config.batch_size = 32  # on all devices together
    config.eval_batch_size = 32
    config.num_epochs = 10

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.learning_rate = 0.01
    config.optimizer.base_batch_size = 32
    config.optimizer.warmup_epochs = 1.0  # then a cosine down to 0

    if recipe:
        config.optimizer.freeze = ("stem.*", "stages.*")
        config.optimizer.learning_rate = 0.1
        config.optimizer.weight_decay = 0.0

    config.step = ConfigDict()
    config.step.label_smoothing = 0.1
    config.step.batch_norm = "frozen"

    config.log_every_steps = 10
    return config
