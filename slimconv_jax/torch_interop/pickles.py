"""Pickles without code: nothing is called but what makes tensors, arrays and plain containers."""

import argparse
import collections
import datetime
import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from slimconv_jax.errors import InputError
from slimconv_jax.torch_interop import import_torch

OF_TORCH = 5
"""Pickles in a file before PyTorch 1.6: magic number, protocol, system, content, and its keys."""

_MOST_ITEMS = 10**7
_MOST_OPCODES = 10**7


def check_pickles(file: BinaryIO, path: Path | str, count: int = 1) -> None:
    """Checks that loading the pickles at the beginning of a file comes to an end.

    A pickle can put the same tuple into a tuple twice, that one into the next, and so on. Where
    such a tuple is a key, Python hashes all of it: 2^40 items of 40 tuples. The same happens where
    a tuple is a key many times, and integers beyond 61 bits can be made to collide.

    Args:
      file: read up to the end of the last pickle.
      path: of the file, for messages.
      count: how many pickles there are, one after the other.

    Raises:
      ValueError: if a tuple, or the arguments of a call, or all keys together, have more than
        `_MOST_ITEMS` items, or a pickle has more than `_MOST_OPCODES` instructions.
      Exception: one of `LIBRARY_ERRORS`, if a pickle is damaged.
    """
    for _ in range(count):
        _check_pickle(file, path)


def _check_pickle(file: BinaryIO, path: Path | str) -> None:
    """Follows one pickle with a stack of the total numbers of items instead of values."""
    stack, memo, of_keys = [], {}, 0
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if number == _MOST_OPCODES:
            raise InputError(f"{path} is refused: it has more than {number:,} instructions")
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            items = []
            for kind in reversed(opcode.stack_before):
                if kind is pickletools.stackslice:
                    while stack[-1] is not None:
                        items.append(stack.pop())
                else:
                    items.append(stack.pop())
            count = 1
            if "TUPLE" in name or name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "FROZENSET"):
                count += sum(filter(None, items))
            elif items and opcode.stack_after:  # a container that gets more
                count = items[-1] or 1
            elif isinstance(argument, int) and abs(argument) >= 2**61 - 1:
                count = 10_000
            if name in ("SETITEM", "SETITEMS", "DICT"):  # values and keys, the last one first
                of_keys += sum(filter(None, items[1::2]))
            elif name in ("ADDITEMS", "FROZENSET"):
                of_keys += sum(filter(None, items))
            if max(count, of_keys) > _MOST_ITEMS:
                raise InputError(
                    f"{path} is refused: a tuple, or all keys together, has more than "
                    f"{_MOST_ITEMS:,} items"
                )
            marks = pickletools.markobject
            stack += [None if kind is marks else count for kind in opcode.stack_after]


class SafeUnpickler(pickle.Unpickler):
    """Makes tensors, arrays and plain containers, and refuses everything else."""

    def __init__(self, file: io.BytesIO, path: Path):
        super().__init__(file, encoding="latin1")  # of Python 2, in which some are still written
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        # What bytes are written as for Python 2, and arrays since pickle's protocol 5.
        allowed = harmless() | {
            "_codecs.encode": lambda text, _: text.encode("latin1"),
            "numpy.core.numeric._frombuffer": np._core.numeric._frombuffer,
            "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,
            "ml_dtypes.bfloat16": jnp.bfloat16.dtype.type,
            "jax._src.array._reconstruct_array": _array_of_jax,
        }
        if module.startswith("torch"):
            torch = import_torch()
            allowed["torch._utils._rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
            allowed["torch._utils._rebuild_parameter"] = torch._utils._rebuild_parameter
            allowed["torch.storage._load_from_bytes"] = self._load_from_bytes
        if (full_name := f"{module}.{name}") not in allowed:
            raise pickle.UnpicklingError(f"GLOBAL {full_name} was not an allowed global")
        return allowed[full_name]

    def _load_from_bytes(self, content: bytes) -> Any:
        check_pickles(io.BytesIO(content), self._path, OF_TORCH)
        return import_torch().load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _array_of_jax(function: Callable, args: tuple, state: tuple, _: Any) -> np.ndarray:
    """Returns a pickled array of JAX as one of NumPy."""
    array = function(*args)
    array.__setstate__(state)
    return array


def harmless() -> dict[str, Any]:
    """Returns what may stand beside the tensors of a training script's checkpoint, by full name."""
    types = [
        *(datetime.datetime, argparse.Namespace),
        *(collections.defaultdict, collections.OrderedDict, np.ndarray, np.dtype),
        *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"),
    ]
    allowed = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in types}
    for kind in (PosixPath, PurePosixPath):
        for module in ("pathlib", "pathlib._local"):  # Python 3.13 writes the second
            allowed[f"{module}.{kind.__name__}"] = kind
    for core in ("core", "_core"):  # NumPy renamed it; files have the old name or the new one
        for name in ("scalar", "_reconstruct"):
            allowed[f"numpy.{core}.multiarray.{name}"] = getattr(np._core.multiarray, name)
    return allowed
