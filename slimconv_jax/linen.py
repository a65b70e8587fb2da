"""SlimConv and the ResNets for Flax Linen code.

    model = slimconv_jax.linen.create_model("sc_resnet50", num_classes=10)
    variables = model.init(key, images)  # "params" and "batch_stats"
    logits = model.apply(variables, images)
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

The modules compute what those of NNX compute, with variables of the same names, so that
`variables(nnx_model)` are theirs.

`flax.nnx.bridge.ToLinen` is not used, since the integers in the paths of NNX lists become keys of
dicts there, which Linen's own tools (`flatten_dict(sep=...)`, say) do not take, and each `apply`
draws new initial values, which for a ResNet-50 takes ten seconds unless it is compiled.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype, PaddingLike

from slimconv_jax.errors import InputError
from slimconv_jax.models import resnet, slimconv
from slimconv_jax.models.slimconv import CompressionRatio
from slimconv_jax.models.zoo import abstract, abstract_resnet, require_module, resnet_config

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def variables(model: nnx.Module) -> dict[str, Any]:
    """The variables of an NNX model for its Linen counterpart.

    Args:
      model: of this package, such as `load_model`, `from_torch` and `create_model` return.

    Returns:
      {"params": ..., "batch_stats": ...}, nested dicts with strings as keys.

    Raises:
      ValueError: if it is no NNX module.
    """
    require_module(model, "linen.variables")
    return {
        collection: unflatten_dict(
            {
                tuple(map(str, path)): variable[...]
                for path, variable in nnx.to_flat_state(nnx.state(model, kind))
            }
        )
        for collection, kind in _COLLECTIONS.items()
    }


def _run(
    scope: nn.Module,
    build: Callable[..., nnx.Module],
    outline: Callable[[], nnx.Module],
    forward: Callable[[nnx.Module], Any],
    train: bool,
) -> Any:
    """Calls an NNX module whose variables are those of a Linen module.

    Args:
      scope: the Linen module, bound.
      build: `build(rngs=...)` is the NNX module with initial values.
      outline: gives the NNX module without its arrays.
      forward: what to call it with.
      train: whether batch statistics are computed, and, unless initialising, updated.
    """
    if not scope.variables.get("params") and scope.is_mutable_collection("params"):
        initial = build(rngs=nnx.Rngs(params=scope.make_rng("params")))
        for collection, tree in variables(initial).items():
            for name, value in tree.items():
                scope.put_variable(collection, name, value)
    if train and not scope.is_mutable_collection("batch_stats"):
        raise InputError(
            f"train=True of {type(scope).__name__} updates the batch statistics: apply takes "
            'mutable=["batch_stats"], too'
        )
    module = nnx.view(outline(), use_running_average=not train)
    for collection, kind in _COLLECTIONS.items():
        given = flatten_dict(nn.meta.unbox(unfreeze(scope.variables.get(collection, {}))))
        for path, variable in nnx.to_flat_state(nnx.state(module, kind)):
            name = tuple(map(str, path))
            if name not in given or given[name].shape != variable.shape:
                raise InputError(
                    f"the variables of {type(scope).__name__} need {collection}/{'/'.join(name)} "
                    f"of shape {variable.shape}, and there is "
                    f"{given[name].shape if name in given else 'none'}"
                )
            variable.set_value(given[name])
    output = forward(module)
    if train and not scope.is_initializing():
        # In the boxes, such as `nn.Partitioned`, that the old ones are in.
        old = unfreeze(scope.variables["batch_stats"])
        new = nn.meta.replace_boxed(old, variables(module)["batch_stats"])
        for name, value in new.items():
            scope.put_variable("batch_stats", name, value)
    return output


class SlimConv(nn.Module):
    """`slimconv_jax.SlimConv` for Linen: the same unit, arguments and names.

    The channels C of the input are those that it is called with; it returns C // r + C // 2r.
    No activation: apply ReLU next.

    Attributes:
      k: see `slimconv_jax.SlimConv`, as for all others.
    """

    k: CompressionRatio | None = None
    reduction: int | None = None
    strides: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    padding: PaddingLike | None = None
    feature_group_count: int = 1
    lower_feature_group_count: int | None = None
    squeeze_ratio: int = 32
    dtype: Dtype | None = None

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (..., H, W, C) to (..., H', W', C // r + C // 2r).

        Args:
          x: the input.
          train: whether batch norm uses and records the statistics of this batch, for which
            "batch_stats" must be mutable.

        Raises:
          ValueError: as `slimconv_jax.SlimConv`, or if the variables are not those of the unit.
        """
        options = {
            field: getattr(self, field)
            for field in SlimConv.__dataclass_fields__
            if field not in ("parent", "name")
        }
        build = functools.partial(slimconv.SlimConv, x.shape[-1], **options)
        return _run(self, build, lambda: abstract(build), lambda unit: unit(x), train)


class ResNet(nn.Module):
    """`slimconv_jax`'s ResNet for Linen; `create_model` makes the named ones.

    Attributes:
      config: the architecture.
      zero_init_residual: whether the last batch norm of each residual branch starts at scale 0.
      remat: whether training recomputes the insides of the blocks to save memory.
      dtype: dtype of the computation; parameters, batch statistics and logits are float32.
    """

    config: resnet.ResNetConfig
    zero_init_residual: bool = False
    remat: bool = False
    dtype: Dtype | None = None

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (N, num_classes) of images (N, H, W, 3), float and normalised.

        Without classes, the pooled features (N, C).

        Args:
          x: the images.
          train: whether batch norm uses and records the statistics of this batch, for which
            "batch_stats" must be mutable.

        Raises:
          ValueError: if the variables are not those of the architecture.
        """
        return self._run(lambda model: model(x), train)

    def features(self, x: jax.Array, train: bool = False) -> list[jax.Array]:
        """The four feature maps of images: `model.apply(variables, x, method="features")`.

        Arguments and errors are those of a call.
        """
        return self._run(lambda model: model.features(x), train)

    def _run(self, forward: Callable[[resnet.ResNet], Any], train: bool) -> Any:
        options = {"remat": self.remat, "dtype": self.dtype}
        build = functools.partial(
            resnet.ResNet, self.config, zero_init_residual=self.zero_init_residual, **options
        )
        return _run(self, build, lambda: abstract_resnet(self.config, **options), forward, train)


def create_model(
    name: str,
    *,
    k: CompressionRatio | None = None,
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    dilation: Sequence[bool] = (False, False, False),
    zero_init_residual: bool = False,
    remat: bool = False,
    dtype: Dtype | None = None,
) -> ResNet:
    """A Linen module of a named architecture.

    Arguments and errors are those of `slimconv_jax.create_model`, but for `rngs`: `init` takes
    the key. It is `init`, too, that notices where a SlimConv of the architecture cannot exist.
    """
    config = resnet_config(
        name, k=k, num_classes=num_classes, stem=stem, width=width, dilation=dilation
    )
    return ResNet(config, zero_init_residual=zero_init_residual, remat=remat, dtype=dtype)
