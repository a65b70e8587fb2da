"""`slim`: puts SlimConv into a trained network."""

import argparse

from slimconv_jax.commands.options import add_weights
from slimconv_jax.commands.train import supervise
from slimconv_jax.signatures import select

HELP = "put SlimConv into a trained ResNet: imitate its layers, then learn from it"

_DESCRIPTION = """Puts SlimConv into a trained ResNet.

Each 3x3 convolution, with the 1x1 convolution after it, becomes SlimConv with a 1x1 convolution.
These first learn to imitate the old layers on training images, all at once; then the network trains
for a few epochs with the old one as its teacher. Prints accuracy, parameters and multiply-adds
before, after the imitation, and at the end; they are also in WORKDIR/slim.json.

WORKDIR becomes the work directory of that training. After Ctrl-C or SIGTERM, the same command
continues. Every key of the config can be set on the command line, as in `train`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `slim`."""
    parser.usage = "%(prog)s MODEL WORKDIR [options] [--config.KEY=VALUE ...]"
    parser.description = _DESCRIPTION
    parser.set_defaults(takes_overrides=True, interrupted="interrupted; nothing was saved")
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a ResNet of bottlenecks: a directory of save_model or `convert`, or of a run",
    )
    add_weights(parser)
    add("workdir", metavar="WORKDIR", help="the new work directory")
    add("--k", default="4/3", help="compression ratio of SlimConv (default: 4/3)")
    add(
        "--config",
        help="a config file, or a name as in `train` (default: that of the run at MODEL, or "
        "finetune); of it, the learning rate becomes a fifth and the schedule a cosine",
    )
    add(
        "--data",
        metavar="NAME",
        help="digits, tfds/NAME, image_folder or synthetic (default: that of the config)",
    )
    add(
        "--data-dir",
        metavar="DIR",
        help="image_folder: the directory of the splits; tfds: where TFDS stores its data sets",
    )
    add(
        "--imitation-steps",
        type=int,
        default=300,
        metavar="N",
        help="batches that the new layers learn to imitate the old ones on (default: 300)",
    )
    add(
        "--num-epochs",
        type=int,
        default=5,
        metavar="N",
        help="epochs of training with the teacher (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Slims a trained network; returns the exit status."""

    def start() -> None:
        from slimconv_jax.training.slimming import describe_stage, slim

        options = select(vars(args), slim) | {"overrides": tuple(args.overrides)}
        for stage in slim(args.model, args.workdir, **options):
            print(describe_stage(stage))

    return supervise(start, args.workdir)
