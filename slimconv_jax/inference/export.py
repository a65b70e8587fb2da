"""Exports saved models: as programs that run without this package, or as weights.

In programs batch norm is folded, and the batch size is symbolic. A file appears only once it has
been run and gives the logits of the model.
"""

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from slimconv_jax.data.preprocessing import Preprocessing, normalize
from slimconv_jax.data.transforms import MOST_SIDE
from slimconv_jax.errors import (
    LIBRARY_ERRORS,
    InputError,
    import_extra,
    require_choice,
    require_integer,
)
from slimconv_jax.files import new_file
from slimconv_jax.inference.saved import SavedModel, open_model
from slimconv_jax.models.resnet import ResNet
from slimconv_jax.models.surgery import fold_batch_norm
from slimconv_jax.models.zoo import describe, require_resnet
from slimconv_jax.storage.model_directory import FORMATS as DIRECTORY_FORMATS
from slimconv_jax.storage.model_directory import save_model, verify_weights

INPUTS = {"float": jnp.float32, "uint8": jnp.uint8}
"""The inputs of exported programs: normalised images, or pixels, which they normalise."""

BATCH_SIZES = (1, 5)
"""The batch sizes at which an exported program is compared with the model."""

TOLERANCE = 1e-4
"""How much logits may differ, as a fraction of the largest of them."""

PLATFORMS = ("cpu", "cuda", "tpu")

Program = Callable[[jax.Array], jax.Array]


class Exported(NamedTuple):
    """A description of what was written.

    Attributes:
      what: what it is, and how it was checked, in words.
      use: how to use it, in Python.
    """

    what: str
    use: str


def export(
    model: SavedModel | epath.PathLike,
    output: os.PathLike | str,
    *,
    format: str,
    input: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a saved model in a format for other programs, and checks what was written.

    Args:
      model: a directory that `load_model` takes, or from `open_model`.
      output: the new file or directory.
      format: one of `FORMATS`: "stablehlo", for `jax.export.deserialize`, or "onnx", a program from
        images to logits; "torch", a state dict with the released names; "orbax" or "safetensors",
        a directory for `load_model`.
      input: of a program: "float" for normalised images, (batch, H, W, 3), float32, or "uint8" for
        pixels, which it normalises itself. None for "float".
      overwrite: whether to replace what is there already.

    Raises:
      ValueError: if an argument is wrong, a package is missing, the output cannot be written, or
        differs from the model, in which case nothing is written.
    """
    check_format(format, input=input)
    saved = model if isinstance(model, SavedModel) else open_model(model)
    return FORMATS[format](saved, output, format, input or "float", overwrite)


def check_format(format: str, *, input: str | None = None, image_size: int | None = None) -> None:
    """Checks that a format exists and takes these options, before long work.

    Raises:
      ValueError: if not.
    """
    require_choice("format", format, FORMATS)
    if format not in PROGRAMS and (input is not None or image_size is not None):
        raise InputError(
            f"--input and --image-size are for {' and '.join(PROGRAMS)}; {format} has only weights"
        )
    if input is not None:
        require_choice("input", input, INPUTS)


def _export_program(
    saved: SavedModel, output: os.PathLike | str, format: str, input: str, overwrite: bool
) -> Exported:
    preprocessing = saved.preprocessing
    height, width, _ = saved.info.get("image_shape", (None, None, 3))
    if preprocessing.image_size is None and height == width:  # as in training
        preprocessing = dataclasses.replace(preprocessing, image_size=height)
    error = export_program(
        saved.model,
        output,
        format=format,
        preprocessing=preprocessing,
        input=input,
        overwrite=overwrite,
    )
    size, images = preprocessing.image_size, "normalised float32" if input == "float" else input
    name = output_name(saved.model)
    return Exported(
        f"for {images} images (batch, {size}, {size}, 3); its {name} at batch sizes 1 and 5 are "
        f"the model's within {error:.1e} of the largest",
        PROGRAMS[format].use.format(output, name),
    )


def _export_state_dict(
    saved: SavedModel, output: os.PathLike | str, format: str, input: str, overwrite: bool
) -> Exported:
    from slimconv_jax.torch_interop.checkpoint_file import write_checkpoint
    from slimconv_jax.torch_interop.convert import to_torch

    write_checkpoint(to_torch(saved.model), output, overwrite=overwrite)
    use = f'net.load_state_dict(torch.load("{output}"))'
    return Exported(f"{describe(saved.model.config)}, read back and the same", use)


def _export_directory(
    saved: SavedModel, output: os.PathLike | str, format: str, input: str, overwrite: bool
) -> Exported:
    save_model(saved.model, output, format=format, overwrite=overwrite, info=saved.info)
    verify_weights(saved.model, output)
    use = f'model = slimconv_jax.load_model("{output}")'
    return Exported(f"{describe(saved.model.config)}, read back and the same", use)


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
      format: one of `PROGRAMS`.
      preprocessing: gives the size of the images, and the normalisation of "uint8" input.
      input: "float" for normalised images (batch, H, W, 3), float32, or "uint8" for
        pixels.
      overwrite: whether to replace a file that is there already.

    Returns:
      The largest difference from the logits of the model, as `TOLERANCE` measures it.

    Raises:
      ValueError: if an argument is wrong, a package is missing, the file cannot be written, or
        the program does not give the logits of the model, in which case no file is written.
    """
    require_resnet(model, "export")
    check_format(format, input=input)
    dtype = model.stem.conv.dtype
    if dtype not in (None, jnp.float32):
        raise InputError(f"export takes a model that computes in float32, not in {dtype}")
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
    program = PROGRAMS[format]
    with new_file(path, overwrite=overwrite) as part:
        program.write(fold_batch_norm(model), prepare, images, part)
        return _verify(program.read(part), model, prepare, images)


def _write_stablehlo(model: ResNet, prepare: Program, images: jax.ShapeDtypeStruct, path: Path):
    program = jax.jit(lambda images: model(prepare(images)))
    import_extra("flatbuffers", extra="export")
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
            # jax2onnx ignores the padding of a pool. After ReLU, 0 does what -infinity does.
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = nnx.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        return model.head(model.stage_outputs(x)[-1])

    jax2onnx, _ = (import_extra(name, extra="export") for name in ("jax2onnx", "onnxruntime"))
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns about intermediate shapes
    names = {"input_names": ["images"], "output_names": [output_name(model)]}
    # jax2onnx lags behind JAX and Flax: it uses deprecated functions, and nested jitted functions
    # fail with the newest versions.
    with warnings.catch_warnings(), jax.disable_jit():
        warnings.simplefilter("ignore")
        try:
            proto = jax2onnx.to_onnx(program, [images], model_name="slimconv_jax", **names)
        except LIBRARY_ERRORS as error:  # of jax2onnx, which does not support all of JAX
            reason = str(error).strip().split("\n")[0]
            raise InputError(f"jax2onnx cannot convert the model: {reason}") from error
    # One file, where jax2onnx itself would write large weights to a second one.
    path.write_bytes(proto.SerializeToString())


def read_onnx(path: Path) -> Program:
    """Reads an exported program, to be run by onnxruntime on the CPU."""
    onnxruntime = import_extra("onnxruntime", extra="export")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": np.asarray(images)})[0]


def output_name(model: ResNet) -> str:
    """Returns what the output of a model is called."""
    return "logits" if model.config.num_classes else "features"


def _verify(
    program: Program, model: ResNet, prepare: Program, images: jax.ShapeDtypeStruct
) -> float:
    """Measures how far a program is from a model on random images, as `TOLERANCE` does.

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
    # CPUs compute in float32 throughout; accelerators round factors to fewer bits by default.
    cpu = jax.local_devices(backend="cpu")[0]
    state = jax.device_put(state, cpu)
    with jax.default_device(cpu):
        reference = jax.jit(lambda state, images: nnx.merge(graphdef, state)(prepare(images)))
        expected = np.asarray(reference(state, inputs))
        if not np.isfinite(expected).all():
            raise InputError("logits of random images are infinite or NaN, so nothing is written")
        differences = [np.asarray(program(inputs[:n])) - expected[:n] for n in BATCH_SIZES]
    largest = np.abs(expected).max() or 1.0  # 1 if all are 0
    error = max(np.abs(difference).max() for difference in differences) / largest
    if not error <= TOLERANCE:  # NaN is not
        raise InputError(
            f"the exported program is off by {error:.1e} of the largest logit, more than "
            f"{TOLERANCE:.0e}, so nothing is written"
        )
    return float(error)


class _ProgramFormat(NamedTuple):
    write: Callable[[ResNet, Program, jax.ShapeDtypeStruct, Path], None]
    read: Callable[[Path], Program]
    use: str


PROGRAMS = {
    "stablehlo": _ProgramFormat(
        _write_stablehlo,
        _read_stablehlo,
        'jax.export.deserialize(bytearray(open("{}", "rb").read())).call(images)',
    ),
    "onnx": _ProgramFormat(
        _write_onnx,
        read_onnx,
        'onnxruntime.InferenceSession("{}").run(["{}"], {{"images": images}})[0]',
    ),
}
"""The formats that are programs: how to write them, read them back, and run them in Python."""

FORMATS = {
    **dict.fromkeys(PROGRAMS, _export_program),
    "torch": _export_state_dict,
    **dict.fromkeys(DIRECTORY_FORMATS, _export_directory),
}
"""The formats, and the function that writes each."""
