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

from slimconv_jax.errors import LIBRARY_ERRORS, InputError
from slimconv_jax.torch_interop import import_torch

OF_TORCH = 5
"""Pickles in a file before PyTorch 1.6: magic number, protocol, system, content, and its keys."""

_MOST_ITEMS = 10**7
_MOST_OPCODES = 10**7


def check_pickles(file: BinaryIO, path: Path | str, count: int = 1) -> None:
    """Makes sure that loading the pickles at the beginning of a file ends.

    A pickle can put the same tuple into a tuple twice, that one into the next, and so on. Where
    such a tuple is a key, Python goes through all of it: 2^40 items of 40 tuples. So it does where
    a tuple is a key many times, and integers beyond 61 bits can be made to collide.

    Args:
      file: is read up to the end of the last of them.
      path: of the file, for messages.
      count: how many pickles there are, one after the other.

    Raises:
      ValueError: if a tuple, or the arguments of a call, or all keys together, have more than
        `_MOST_ITEMS` items, a pickle has more than `_MOST_OPCODES` instructions, or it is damaged.
    """
    try:
        for _ in range(count):
            _check_pickle(file, path)
    except InputError:
        raise
    except (*LIBRARY_ERRORS, UnicodeDecodeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{path} is not a checkpoint, or is truncated or damaged: {reason}"
        ) from None


def _check_pickle(file: BinaryIO, path: Path | str) -> None:
    """Follows one pickle with the number of items, all told, in place of each value."""
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
        allowed = {
            tuple(x[1].rsplit(".", 1))
            if isinstance(x, tuple)
            else (x.__module__, x.__qualname__): x[0] if isinstance(x, tuple) else x
            for x in harmless()
        }
        # What bytes are written as for Python 2, and arrays since pickle's protocol 5.
        allowed["_codecs", "encode"] = lambda text, _: text.encode("latin1")
        for core in ("core", "_core"):
            allowed[f"numpy.{core}.numeric", "_frombuffer"] = np._core.numeric._frombuffer
        allowed["ml_dtypes", "bfloat16"] = jnp.bfloat16.dtype.type
        allowed["jax._src.array", "_reconstruct_array"] = _array_of_jax
        if module.startswith("torch"):
            torch = import_torch()
            allowed["torch._utils", "_rebuild_tensor_v2"] = torch._utils._rebuild_tensor_v2
            allowed["torch._utils", "_rebuild_parameter"] = torch._utils._rebuild_parameter
            allowed["torch.storage", "_load_from_bytes"] = self._load_from_bytes
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")
        return allowed[module, name]

    def _load_from_bytes(self, content: bytes) -> Any:
        check_pickles(io.BytesIO(content), self._path, OF_TORCH)
        return import_torch().load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _array_of_jax(function: Callable, args: tuple, state: tuple, _: Any) -> np.ndarray:
    """A pickled array of JAX, as one of NumPy."""
    array = function(*args)
    array.__setstate__(state)
    return array


def harmless() -> list[Any]:
    """What may stand beside the tensors of a training script's checkpoint."""
    # NumPy renamed numpy.core; files have the old names or the new ones.
    multiarray = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, function in (
            ("scalar", np._core.multiarray.scalar),
            ("_reconstruct", np._core.multiarray._reconstruct),
        )
    ]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"]
    return [
        *multiarray,
        *dtypes,
        *(datetime.datetime, PosixPath, PurePosixPath),
        np.dtype,
        np.ndarray,
        argparse.Namespace,
        collections.defaultdict,
        collections.OrderedDict,
    ]
