"""`python -m slimconv_jax export`: programs that run without this package, and weights."""

import collections
import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import nnx
from randomize import apply, randomized

from slimconv_jax import devices, load_model, save_model
from slimconv_jax.__main__ import main
from slimconv_jax.data.preprocessing import Preprocessing
from slimconv_jax.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from slimconv_jax.inference import export as exporting
from slimconv_jax.models.zoo import abstract_model, abstract_resnet


@pytest.fixture(autouse=True)
def no_cache_of_its_own(monkeypatch):
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def model():
    return randomized(lambda: abstract_model("sc_resnet14", k="8/3", width=16, num_classes=7))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    preprocessing = {"image_size": 33, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    save_model(model, path, info={"preprocessing": preprocessing})
    return path


RUN = {
    "stablehlo": "import jax\n"
    "with open(path, 'rb') as file:\n"
    "    run = jax.export.deserialize(bytearray(file.read())).call\n",
    "onnx": "import onnxruntime\n"
    "session = onnxruntime.InferenceSession(path)\n"
    "run = lambda images: session.run(['logits'], {'images': images})[0]\n",
}


@pytest.mark.process
@pytest.mark.parametrize(("format", "input"), [("stablehlo", "uint8"), ("onnx", "float")])
def test_a_program_gives_the_logits_without_this_package(
    format, input, model, saved, tmp_path, capsys
):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (5, 33, 33, 3), np.uint8)
    normalized = ((pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32)
    np.save(tmp_path / "images.npy", pixels if input == "uint8" else normalized)

    program = tmp_path / f"model.{format}"
    arguments = ["export", str(saved), str(program), "--format", format, "--input", input]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    kind = "uint8" if input == "uint8" else "normalised float32"
    assert f"for {kind} images (batch, 33, 33, 3); its logits at batch sizes 1 and 5" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", program.name]

    if format == "onnx":
        nodes = collections.Counter(node.op_type for node in onnx.load(program).graph.node)
        convolutions = [module for _, module in nnx.iter_modules(model) if type(module) is nnx.Conv]
        assert nodes["Conv"] == len(convolutions)
        assert nodes["Gemm"] == 2 * 4 + 1  # of the four gates and the classifier

    script = tmp_path / "run.py"
    script.write_text(
        f"import sys\nimport numpy as np\npath = {str(program)!r}\n{RUN[format]}"
        "images = np.load('images.npy')\n"
        "np.savez('logits.npz', one=run(images[:1]), five=run(images))\n"
        "assert not any(name.startswith('slimconv_jax') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True)
    with np.load(tmp_path / "logits.npz") as file:
        logits = dict(file)
    model.eval()
    expected = np.asarray(apply(model, normalized))
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(logits["five"], expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits["one"], expected[:1], rtol=0, atol=tolerance)

    assert main(arguments) == 1
    assert f"{program} exists already; --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what",
    [*(pytest.param(what, marks=pytest.mark.long) for what in ("remat", "zero")), "features"],
)
def test_what_else_can_be_exported(what, model, tmp_path):
    config = dataclasses.replace(model.config, num_classes=0 if what == "features" else 7)
    other = randomized(lambda: abstract_resnet(config, remat=what == "remat"))
    if what == "zero":
        for variable in (other.classifier.kernel, other.classifier.bias):
            variable.set_value(0 * variable[...])
    preprocessing = Preprocessing(image_size=16)
    path, options = tmp_path / "out", {"preprocessing": preprocessing, "format": "stablehlo"}
    assert exporting.export_program(other, path, **options) <= 1e-5
    assert path.exists()


def test_a_wrong_program_is_not_written(saved, tmp_path, monkeypatch, capsys):
    def fold(model):
        folded = original(model)
        bias = folded.classifier.bias
        bias.set_value(bias[...] + jnp.arange(7) * 1e-2)
        return folded

    original = exporting.fold_batch_norm
    monkeypatch.setattr(exporting, "fold_batch_norm", fold)
    path = tmp_path / "model.stablehlo"
    assert main(["export", str(saved), str(path), "--format", "stablehlo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the exported program is off by ")
    assert error.endswith("of the largest logit, more than 1e-04, so nothing is written\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["orbax", "safetensors", "torch"])
def test_weights_are_read_back(format, saved, tmp_path, monkeypatch, capsys):
    arguments = ["export", str(saved), str(tmp_path / "out"), "--format", format]
    assert main(arguments) == 0
    assert "sc_resnet14, k=8/3, 7 classes, width 16, read back and the same" in (
        capsys.readouterr().out
    )


def test_weights_that_came_out_otherwise_are_noticed(saved, tmp_path, monkeypatch, capsys):
    from slimconv_jax.storage import model_directory as saving

    def damaged(path, **options):
        model = load_model(path, **options)
        bias = model.classifier.bias
        bias.set_value(bias[...].at[3].add(1e-3))
        return model

    monkeypatch.setattr(saving, "load_model", damaged)
    with pytest.raises(ValueError, match="out does not have the weights that were written"):
        model = load_model(saved)
        save_model(model, tmp_path / "out")
        saving.verify_weights(model, tmp_path / "out")


def test_bad_input(model, saved, tmp_path, monkeypatch, capsys):
    unsized, infinite = tmp_path / "unsized", tmp_path / "infinite"
    save_model(model, unsized, info={"preprocessing": {"image_size": None}})
    broken = load_model(saved)
    broken.classifier.bias.set_value(broken.classifier.bias[...] / 0)
    save_model(broken, infinite, info={"preprocessing": {"image_size": 8}})
    out, uint8 = str(tmp_path / "out"), ["--input", "uint8"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    for arguments, message in (
        ([tmp_path / "none", out, "--format", "onnx"], f"there is no directory {tmp_path}/none"),
        ([tmp_path, out, "--format", "onnx"], f"{tmp_path} holds no model: there is no model.json"),
        (
            [saved, out, "--format", "onnx"],
            "this needs onnxruntime, which is not installed: pip install 'slimconv_jax[export]', "
            "or, in a clone, pip install -e '.[export]'",
        ),
        (
            [saved, out, "--format", "torch", *uint8],
            "--input and --image-size are for stablehlo and onnx; torch has only weights",
        ),
        (
            [unsized, out, "--format", "stablehlo"],
            "the model takes images as they are, so an image_size has to be given",
        ),
        (
            [saved, out, "--format", "stablehlo", "--image-size", "0"],
            "image_size=0 must be an integer >= 1",
        ),
        (
            [saved, tmp_path / "no" / "out", "--format", "stablehlo"],
            f"cannot write {tmp_path}/no/out: No such file or directory",
        ),
        (
            [infinite, out, "--format", "stablehlo"],
            "logits of random images are infinite or NaN, so nothing is written",
        ),
    ):
        assert main(["export", *map(str, arguments)]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["infinite", "unsized"]
    half = abstract_resnet(model.config, dtype=jnp.bfloat16)
    for other, message in (
        (half, "export takes a model that computes in float32, not in bfloat16"),
        (model.stem, "export takes a slimconv_jax ResNet, not a ConvBN"),
    ):
        with pytest.raises(ValueError, match=message):
            exporting.export_program(other, out, preprocessing=Preprocessing(), format="onnx")
    for options, message in (
        ({"format": "tflite"}, "format='tflite' must be one of 'stablehlo', 'onnx'"),
        ({"format": "onnx", "input": "int8"}, "input='int8' must be one of 'float', 'uint8'"),
    ):
        with pytest.raises(ValueError, match=message):
            exporting.export_program(model, out, preprocessing=Preprocessing(), **options)
