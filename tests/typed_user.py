"""What a type checker sees of the public names; mypy checks it, strictly, and nobody runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np
from flax import nnx

import slimconv_jax as sc
from slimconv_jax.inference.export import Exported
from slimconv_jax.inference.predict import Prediction
from slimconv_jax.inference.saved import SavedModel
from slimconv_jax.models.slimify import SlimifyReport

assert_type(sc.__version__, str)
rngs = nnx.Rngs(0)

unit = sc.SlimConv(64, k="4/3", strides=2, rngs=rngs)
assert_type(unit, sc.SlimConv)
assert_type(unit.out_features, int)

model = sc.create_model("sc_resnet50", k="8/3", num_classes=10, rngs=rngs)
assert_type(model, sc.ResNet)
assert_type(model.config, sc.ResNetConfig)
images = jax.numpy.zeros((1, 32, 32, 3))
assert_type(model.features(images), list[jax.Array])
assert_type(sc.list_models(), list[str])
assert_type(sc.count_params(model), int)
assert_type(sc.count_macs(model, image_size=224), int)
assert_type(sc.backbone(model, output_stride=8), sc.ResNet)
slim, report = sc.slimify(model, k="4/3")
assert_type(report, SlimifyReport)
folded = sc.fold_batch_norm(model)

sc.save_model(model, Path("a"), format="safetensors")
assert_type(sc.load_model("a", ema=True), sc.ResNet)
assert_type(sc.to_torch(model), dict[str, np.ndarray])
assert_type(sc.from_torch({}, arch="resnet50"), sc.ResNet)

saved = sc.open_model("a", image_size=32)
assert_type(saved, SavedModel)
assert_type(sc.evaluate(saved, "digits"), dict[str, Any])
assert_type(sc.predict("a", ["b.png"]), Iterator[Prediction])
assert_type(sc.export("a", "b", format="onnx"), Exported)
assert_type(issubclass(sc.InputError, ValueError), bool)

linen_model = sc.linen.create_model("sc_resnet50", k=2)
assert_type(linen_model, sc.linen.ResNet)
linen_unit = sc.linen.SlimConv(k="4/3")
variables = sc.linen.variables(model)
