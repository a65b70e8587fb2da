"""PyTorch checkpoints in, PyTorch checkpoints out; torch is imported only when needed."""

import types

from slimconv_jax.errors import import_extra


def import_torch() -> types.ModuleType:
    """PyTorch, or the command that installs it.

    Raises:
      ValueError: if PyTorch is not installed.
    """
    return import_extra("torch", extra="torch", package="PyTorch")
