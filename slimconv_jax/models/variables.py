"""What a model is made of beside its structure: its variables, by collection."""

from typing import Any

from flax import nnx

PyTree = Any

_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat, "other": ...}
"""The collections, as Linen calls them, and the kinds of variables in each; the last has the rest.

Of the models of this package nothing is left for it; the keys of dropout are, for one.
"""


def variables(model: nnx.Module) -> dict[str, PyTree]:
    """The variables of a model, which may be abstract: nested dicts of its arrays.

    Returns:
      "params", "batch_stats", and "other" where a model has others.
    """
    states = nnx.split(model, *_KINDS.values())[1:]
    trees = {name: nnx.to_pure_dict(s) for name, s in zip(_KINDS, states, strict=True)}
    if not trees["other"]:
        del trees["other"]
    return trees


def merge(graphdef: nnx.GraphDef, variables: dict[str, PyTree]) -> nnx.Module:
    """The model of a structure and variables, as `variables` gives them."""
    return nnx.merge(graphdef, *variables.values())


def by_name(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables of a model by path, joined by dots."""
    return {".".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
