"""SlimConv and the Sc-ResNet family in Flax."""

import lazy_loader

# What is public, and where it is, stands in __init__.pyi; it is imported when it is used first.
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"


def __getattr__(name: str):
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        install = "pip install 'slimconv_jax[train]'"
        raise ImportError(f"{__name__}.{name} needs {error.name}: {install}") from error
