"""Pickles without code: nothing is called but what makes tensors, arrays and plain containers."""

import argparse
import collections
import datetime
import io
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from slimconv_jax.errors import LIBRARY_ERRORS, InputError
from slimconv_jax.torch_interop import import_torch

_LARGEST_TUPLE = 10**6
_MOST_OPCODES = 3 * 10**6


def check_pickles(content: bytes, path: Path | str) -> None:
    """Makes sure that loading some pickles, one after the other, ends.

    A pickle can put the same tuple into a tuple twice, that one into the next, and so on. Where
    such a tuple is a key, say, Python goes through all of it, 2^40 items of 40 tuples.

    Raises:
      ValueError: if there is a tuple, or a call, of more than `_LARGEST_TUPLE` items in all, or one
        of the pickles has more than `_MOST_OPCODES` instructions.
    """
    stream = io.BytesIO(content)
    try:
        while stream.tell() < len(content):
            _check_pickle(stream, path)
    except InputError:
        raise
    except (*LIBRARY_ERRORS, UnicodeDecodeError):
        return  # the end of the pickles, or damage, which the loader explains


def _check_pickle(stream: io.BytesIO, path: Path | str) -> None:
    """Follows one pickle with the number of items, all told, in place of each value."""
    stack, memo = [], {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
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
            if count > _LARGEST_TUPLE:
                raise InputError(
                    f"{path} is refused: its tuples hold one another, more than {_LARGEST_TUPLE:,} "
                    "items in all; no model is written so"
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
        check_pickles(content, self._path)
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
