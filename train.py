"""Trains a model as a config says; `python train.py --help` has the options."""

import sys

from slimconv_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(command="train"))
