"""PyTorch checkpoints in, PyTorch checkpoints out; torch is imported only when needed."""

import types

from slimconv_jax.errors import import_extra


def import_torch() -> types.ModuleType:
    """Imports PyTorch.

    Raises:
      ValueError: if PyTorch is not installed; the message has the command that installs it.
    """
    return import_extra("torch", extra="torch", package="PyTorch")
