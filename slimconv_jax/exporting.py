"""Saved models as programs that run without this package: StableHLO and ONNX.

Batch norm is folded, and the batch size is symbolic. A file is there only once it has been run
and found to give the logits of the model.
"""

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slimconv_jax.data.transforms import MOST_SIDE
from slimconv_jax.errors import LIBRARY_ERRORS, InputError, import_extra, require_integer
from slimconv_jax.evaluation import Preprocessing
from slimconv_jax.files import new_file
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.surgery import fold_batch_norm
from slimconv_jax.models.zoo import require_resnet
from slimconv_jax.training.augment import normalize

INPUTS = {"float": jnp.float32, "uint8": jnp.uint8}
"""What an exported program takes: normalised images, or pixels, which it normalises itself."""

BATCH_SIZES = (1, 5)
"""At which an exported program is compared with the model."""

TOLERANCE = 1e-4
"""By how much logits may differ, as a fraction of the largest of them."""

PLATFORMS = ("cpu", "cuda", "tpu")

Program = Callable[[jax.Array], jax.Array]


def export_program(
    model: ResNet,
    path: os.PathLike | str,
    *,
    format: str,
    preprocessing: Preprocessing,
    input: str = "float",
    overwrite: bool = False,
) -> float:
    """Writes a model as a program from images to logits, and verifies it.

    Args:
      model: the model; its batch norm is folded in the program.
      path: the new file.
      format: "stablehlo", for `jax.export.deserialize`, or "onnx".
      preprocessing: gives the size of the images, and the normalisation of "uint8" input.
      input: "float" for normalised images (batch, H, W, 3), float32, or "uint8" for
        pixels.
      overwrite: whether a file that is there already is replaced.

    Returns:
      The largest difference from the logits of the model, as `TOLERANCE` measures it.

    Raises:
      ValueError: if an argument is wrong, a package is missing, the file cannot be written, or
        the program does not give the logits of the model, in which case there is no file.
    """
    require_resnet(model, "export")
    dtype = model.stem.conv.dtype
    if dtype not in (None, jnp.float32):
        raise InputError(f"export takes a model that computes in float32, not in {dtype}")
    if format not in FORMATS:
        raise InputError(f"format={format!r} must be one of {', '.join(map(repr, FORMATS))}")
    if input not in INPUTS:
        raise InputError(f"input={input!r} must be one of {', '.join(map(repr, INPUTS))}")
    size = preprocessing.image_size
    if size is None:
        raise InputError("the model takes images as they are, so an image_size has to be given")
    require_integer("image_size", size, 1, MOST_SIDE)

    def prepare(images: jax.Array) -> jax.Array:
        if input == "float":
            return images
        return normalize(images, mean=preprocessing.mean, std=preprocessing.std)

    batch = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((*batch, size, size, 3), INPUTS[input])
    write, read = _WRITE_AND_READ[format]
    with new_file(path, overwrite=overwrite) as part:
        write(fold_batch_norm(model), prepare, images, part)
        return _verify(read(part), model, prepare, images)


def _write_stablehlo(model: ResNet, prepare: Program, images: jax.ShapeDtypeStruct, path: Path):
    program = jax.jit(lambda images: model(prepare(images)))
    path.write_bytes(jax.export.export(program, platforms=PLATFORMS)(images).serialize())


def _read_stablehlo(path: Path) -> Program:
    return jax.export.deserialize(bytearray(path.read_bytes())).call


def _write_onnx(model: ResNet, prepare: Program, images: jax.ShapeDtypeStruct, path: Path):
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):  # as one node each, which runtimes know best
            module.conv_general_dilated = jax.lax.conv_general_dilated

    def program(images: jax.Array) -> jax.Array:
        x = nnx.relu(model.stem(prepare(images)))
        if model.config.stem == "imagenet":
            # jax2onnx leaves out the padding of a pool. After ReLU, 0 is as good as its -infinity.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        return model.head(model.stage_outputs(x)[-1])

    jax2onnx, _ = (import_extra(name, extra="export") for name in ("jax2onnx", "onnxruntime"))
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of shapes in the middle
    names = {"input_names": ["images"], "output_names": [output_name(model)]}
    # It lags behind JAX and Flax: what it uses is deprecated, and functions within functions fail
    # with the newest.
    with warnings.catch_warnings(), jax.disable_jit():
        warnings.simplefilter("ignore")
        try:
            proto = jax2onnx.to_onnx(program, [images], model_name="slimconv_jax", **names)
        except LIBRARY_ERRORS as error:  # of jax2onnx, which knows not everything in JAX
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"jax2onnx cannot convert the model: {reason}") from error
    # Whole, where jax2onnx itself would write large weights to a second file.
    path.write_bytes(proto.SerializeToString())


def read_onnx(path: Path) -> Program:
    """An exported program, run by onnxruntime on the CPU."""
    onnxruntime = import_extra("onnxruntime", extra="export")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": np.asarray(images)})[0]


def output_name(model: ResNet) -> str:
    """What a model gives."""
    return "logits" if model.config.num_classes else "features"


def _verify(
    program: Program, model: ResNet, prepare: Program, images: jax.ShapeDtypeStruct
) -> float:
    """How far a program is from a model on random images.

    Raises:
      ValueError: if it is too far, or the logits are not finite.
    """
    rng = np.random.default_rng(0)
    shape = (max(BATCH_SIZES), *images.shape[1:])
    if images.dtype == jnp.uint8:
        inputs = rng.integers(0, 256, shape, np.uint8)
    else:
        inputs = rng.normal(size=shape).astype(np.float32)
    graphdef, state = nnx.split(nnx.view(model, use_running_average=True))
    # Where float32 is float32: accelerators round the factors of products, unless told otherwise.
    cpu = jax.local_devices(backend="cpu")[0]
    state = jax.device_put(state, cpu)
    with jax.default_device(cpu):
        reference = jax.jit(lambda state, images: nnx.merge(graphdef, state)(prepare(images)))
        expected = np.asarray(reference(state, inputs))
        if not np.isfinite(expected).all():
            raise InputError("logits of random images are infinite or NaN, so nothing is written")
        differences = [np.asarray(program(inputs[:n])) - expected[:n] for n in BATCH_SIZES]
    largest = np.abs(expected).max() or 1.0  # if all are 0
    error = max(np.abs(difference).max() for difference in differences) / largest
    if not error <= TOLERANCE:  # which NaN is not, either
        raise InputError(
            f"the exported program is off by {error:.1e} of the largest logit, more than "
            f"{TOLERANCE:.0e}, so nothing is written"
        )
    return float(error)


_WRITE_AND_READ = {
    "stablehlo": (_write_stablehlo, _read_stablehlo),
    "onnx": (_write_onnx, read_onnx),
}
FORMATS = tuple(_WRITE_AND_READ)
