"""Which parameters are trained, and how fast, by patterns of their names.

A parameter is named by its path, such as "stages.0.0.conv1.conv.kernel". In a pattern, * stands for
any characters, ? for one, and [...] for one of several.
"""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from slimconv_jax.errors import InputError, require_number

PyTree = Any


def names_of(params: PyTree) -> PyTree:
    """Returns the name of each parameter, in the structure of the parameters."""

    def name(path: tuple, _: Any) -> str:
        return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)

    return jax.tree_util.tree_map_with_path(name, params)


def trained(params: PyTree, freeze: Sequence[str]) -> PyTree:
    """Returns for each parameter whether it is trained, that is, matches no pattern of `freeze`."""
    return jax.tree.map(lambda name: not _matches(name, freeze), names_of(params))


def rate_factors(
    params: PyTree, learning_rate_factors: Sequence[str], layer_decay: float
) -> PyTree:
    """Returns the factor of each parameter's learning rate.

    Args:
      params: with the names of a ResNet's.
      learning_rate_factors: patterns and factors, such as "classifier.*=10"; all that match count.
      layer_decay: the factor is 1 for the classifier, and this times that of the layer above for
        each block and the stem (as in timm).
    """
    names = names_of(params)
    leaves = jax.tree.leaves(names)
    blocks = {tuple(map(int, found.groups())) for name in leaves if (found := _BLOCK.match(name))}
    order = {block: number for number, block in enumerate(sorted(blocks), 1)}
    factors = [_parse_factor(text) for text in learning_rate_factors]

    def factor(name: str) -> float:
        found = _BLOCK.match(name)
        layer = order[tuple(map(int, found.groups()))] if found else len(order) + 1
        depth = len(order) + 1 - (0 if name.startswith("stem.") else layer)
        value = layer_decay**depth
        for pattern, more in factors:
            value *= more if _matches(name, [pattern]) else 1
        return value

    return jax.tree.map(factor, names)


_BLOCK = re.compile(r"stages\.(\d+)\.(\d+)\.")


def adapt(
    optimizer: optax.GradientTransformation,
    *,
    freeze: Sequence[str] = (),
    learning_rate_factors: Sequence[str] = (),
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Restricts an optimiser to the parameters that are trained, each at its own rate.

    Raises:
      ValueError: if a setting is not valid; `check_patterns` checks against the parameters.
    """
    require_number("optimizer: layer_decay", layer_decay, least=0, most=1)
    for name, patterns in (("freeze", freeze), ("learning_rate_factors", learning_rate_factors)):
        is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
        if not is_list or any(not isinstance(pattern, str) for pattern in patterns):
            raise InputError(f"optimizer: {name}={patterns!r} must be a list of patterns")
    for text in learning_rate_factors:
        _parse_factor(text)
    if freeze:
        transforms = {True: optimizer, False: optax.set_to_zero()}
        optimizer = optax.partition(transforms, lambda params: trained(params, freeze))
    if learning_rate_factors or layer_decay != 1:

        def scale(updates: PyTree, params: PyTree) -> PyTree:
            factors = rate_factors(params, learning_rate_factors, layer_decay)
            return jax.tree.map(lambda update, factor: update * factor, updates, factors)

        optimizer = optax.chain(optimizer, optax.stateless(scale))
    return optimizer


def check_patterns(
    params: PyTree, *, freeze: Sequence[str] = (), learning_rate_factors: Sequence[str] = ()
) -> None:
    """Checks that every pattern matches a parameter, and that some are trained.

    Raises:
      ValueError: if not.
    """
    names = jax.tree.leaves(names_of(params))
    patterns = [("freeze", pattern) for pattern in freeze]
    patterns += [("learning_rate_factors", _parse_factor(t)[0]) for t in learning_rate_factors]
    for key, pattern in patterns:
        if not any(_matches(name, [pattern]) for name in names):
            parts = [".".join(n.split(".")[:depth]) for n in names for depth in range(1, 7)]
            near = difflib.get_close_matches(pattern.rstrip("*."), dict.fromkeys(parts), n=1)
            hint = f" (did you mean '{near[0]}*'?)" if near else ""
            raise InputError(
                f"optimizer: {key}: {pattern!r} matches no parameter{hint}; they have names such "
                f"as {names[0]!r} and {names[-1]!r}"
            )
    if not any(jax.tree.leaves(trained(params, freeze))):
        raise InputError(f"optimizer: freeze={tuple(freeze)!r} leaves no parameter to train")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _parse_factor(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value < 1e6:
        raise InputError(
            f"optimizer: learning_rate_factors has {text!r}; it must be PATTERN=FACTOR, with a "
            "factor from 0 on, such as 'classifier.*=10'"
        )
    return pattern, value
