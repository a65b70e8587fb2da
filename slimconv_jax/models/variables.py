"""The variables of a model, by collection."""

from typing import Any

from flax import nnx

PyTree = Any

_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "other": ...}
"""The collections, by Linen's names, and the kind of variables in each.

"other" has the rest, such as the keys of dropout. It is empty for the models of this package.
"""


def variables(model: nnx.Module) -> dict[str, PyTree]:
    """Returns the variables of a model, which may be abstract, as nested dicts of arrays.

    Returns:
      "params", "batch_stats", and "other" if the model has others.
    """
    states = nnx.split(model, *_KINDS.values())[1:]
    trees = {name: nnx.to_pure_dict(s) for name, s in zip(_KINDS, states, strict=True)}
    if not trees["other"]:
        del trees["other"]
    return trees


def merge(graphdef: nnx.GraphDef, variables: dict[str, PyTree]) -> nnx.Module:
    """Builds a model from its structure and the variables that `variables` returns."""
    return nnx.merge(graphdef, *variables.values())


def by_name(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the variables of a model by path, joined by dots."""
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
