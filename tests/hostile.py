"""Files that strangers might send, damaged or made to harm, one for each seed.

As a program, it is what opens them: for each line of JSON on standard input, a list of a command
and its arguments, it writes one with the exit status, what was said, the seconds and the memory.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import pickle
import resource
import shutil
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
from image_files import encode, smooth

VALUES = (
    *(None, True, -1, 0, 2**31, 2**40, 10**30, 1.5, 1e308, -1e308, "", "x", "\x1b[31m", [], {}),
    *([[]], [0] * 4, [2**40] * 4, "../../x", "/dev/zero", "\x00", {"a": {"b": []}}),
)


def choose(rng, options):
    return options[rng.integers(len(options))]


def not_a_file(rng, path):
    """Puts something else where a file was."""
    path.unlink(missing_ok=True)
    kind = choose(rng, ["directory", "pipe", "loop", "device", "sparse", "nothing"])
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**31)
    return kind


def damage(rng, content, least=0):
    """Some bytes changed, left out, doubled or cut off, from the position `least` on."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(least, max(len(content), least + 1)))
        kind = choose(rng, ["flip", "cut", "double", "insert"])
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.integers(8)
        elif kind == "cut":
            del content[at : at + int(rng.integers(1, 50))]
        elif kind == "double":
            content[at:at] = content[at : at + int(rng.integers(1, 50))]
        else:
            content[at:at] = rng.bytes(rng.integers(1, 9))
    return bytes(content)


def damaged_json(rng, path):
    """Another value somewhere in a JSON file, or no JSON at all."""
    kind = choose(rng, ["value", "value", "value", "deep", "bytes", "list"])
    if kind == "value":
        content = json.loads(path.read_text())
        holder, key = None, None
        inner = content
        while isinstance(inner, dict | list) and inner and (holder is None or rng.random() < 0.8):
            holder = inner
            key = choose(rng, list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = holder[key]
        holder[key] = copy.deepcopy(choose(rng, VALUES))
        path.write_text(json.dumps(content))
    elif kind == "deep":
        opening = choose(rng, ["[", '{"a":', '[{"a":'])
        path.write_text(opening * int(rng.integers(33, 100_000)))
    elif kind == "bytes":
        path.write_bytes(damage(rng, path.read_bytes()))
    else:
        path.write_text("[]")
    return kind


# --- checkpoints


class Call:
    """What a pickle calls."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def zeros_in_zip(source, path, megabytes, name):
    """An archive with one member more, of zeros."""
    with (
        zipfile.ZipFile(source) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for member in old.infolist():
            new.writestr(member.filename, old.read(member.filename))
        with new.open(name, "w", force_zip64=True) as file:
            for _ in range(megabytes):
                file.write(bytes(2**20))


def shared(depth, width):
    inner = {"epoch": 1}
    for _ in range(depth):
        inner = {f"k{i}": inner for i in range(width)}
    return inner


def tuples_of_tuples(depth):
    """A pickle of a dict whose key is a tuple of the same tuple twice, and so on."""
    text = b"\x80\x02)q\x00"
    for i in range(depth):
        text += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1])
    return text + b"}h" + bytes([depth]) + b"K\x01s."


def checkpoint(rng, directory, good, kind=None):
    import torch

    tensors = torch.load(good / "good.pth", weights_only=True)
    name = choose(rng, list(tensors))
    path = directory / "a.pth"
    kind = kind or choose(rng, CHECKPOINTS)
    if kind == "expanded":
        dtype = choose(rng, [torch.float32, torch.float16, torch.float64, torch.uint8])
        size = int(10 ** rng.uniform(8, 14))
        torch.save(tensors | {name: torch.ones(1, dtype=dtype).expand(size)}, path)
    elif kind == "many expanded":
        size = int(10 ** rng.uniform(6.5, 7.2))
        many = {f"layer1.{i}.conv1.weight": torch.ones(1).expand(size) for i in range(999)}
        torch.save(tensors | many, path)
    elif kind == "shared":
        torch.save(shared(int(rng.integers(3, 9)), int(rng.integers(50, 400))), path)
    elif kind == "tuples":
        path = path.with_suffix(choose(rng, [".pth", ".pkl"]))
        path.write_bytes(tuples_of_tuples(int(rng.integers(25, 200))))
    elif kind == "keys":
        path = path.with_suffix(".pkl")
        if rng.random() < 0.5:  # the same long tuple, or integers that collide
            text = tuples_of_tuples(17).removesuffix(b"}h\x11K\x01s.")
            path.write_bytes(text + b"}" + b"(h\x11K\x01u" * 50_000 + b".")
        else:
            with path.open("wb") as file:
                pickle.dump({i: {i * (2**61 - 1): 1} for i in range(50_000)}, file)
                file.seek(0)
                file.write(b"\x80\x02}(")
                for i in range(50_000):
                    number = (i * (2**61 - 1)).to_bytes(12, "little")
                    file.write(b"\x8a\x0c" + number + b"K\x01")
                file.write(b"u.")
    elif kind == "in disguise":
        bomb = tuples_of_tuples(int(rng.integers(30, 200)))
        if rng.random() < 0.5:
            with zipfile.ZipFile(good / "good.pth") as old, zipfile.ZipFile(path, "w") as new:
                for member in old.infolist():
                    inner = member.filename.replace("data.pkl", "DATA.PKL")
                    content = bomb if inner != member.filename else old.read(member.filename)
                    new.writestr(inner, content)
        else:
            path = path.with_suffix(".pkl")
            path.write_bytes(b"\x80\x02S'\xff'\n0" + bomb[2:])
    elif kind == "many files":
        path = directory / f"m-1-of-{int(10 ** rng.uniform(6, 12))}.safetensors"
        path.write_bytes(b"1")
    elif kind == "long name":
        part = choose(rng, ["conv.", "layer1.", "a", "module.", "1", "layer1.0.", ".", "block1"])
        long = part * (270_000 // len(part))
        torch.save(tensors | {f"layer1.0.{long}weight": torch.ones(3)}, path)
    elif kind == "shadowed":
        parameter = torch.nn.Parameter(torch.ones(3))
        for method in ("detach", "is_floating_point", "to", "numpy", "size", "resolve_neg"):
            setattr(parameter, method, choose(rng, ["x", 3, None]))
        torch.save(tensors | {name: parameter}, path)
    elif kind == "pretends":
        pretender = argparse.Namespace(ndim=choose(rng, ["x", 3]), dtype="f4", shape=(3,))
        torch.save(tensors | {name: pretender}, path)
    elif kind == "zeros":
        if rng.random() < 0.5:
            zeros_in_zip(good / "good.pth", path, int(rng.integers(200, 1025)), "good/data/x")
        else:
            path = path.with_suffix(".npz")
            zeros_in_zip(good / "good.npz", path, int(rng.integers(200, 1025)), "x.npy")
    elif kind == "memory":
        path = path.with_suffix(".pkl")
        size = int(10 ** rng.uniform(8.5, 14))
        with path.open("wb") as file:
            pickle.dump({name: Call(np.ndarray, (size,), "f4")}, file)
    elif kind == "code":
        code = "__import__('os').mkdir('evil')"
        calls = ((os.system, "mkdir evil"), (os.mkdir, "evil"), (eval, code), (exec, code))
        call = Call(*choose(rng, calls))
        if rng.random() < 0.5:
            torch.save(tensors | {name: call}, path)
        else:
            path = path.with_suffix(".pkl")
            with path.open("wb") as file:
                pickle.dump({name: call}, file)
    elif kind == "deep":
        path = path.with_suffix(".pkl")
        path.write_bytes(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".")
    elif kind == "opcodes":
        path = path.with_suffix(choose(rng, [".pth", ".pkl"]))
        opcodes = b"(.0]})l}dst\x85\x86\x87aeusbR\x81q\x00h\x00K\x01N\x88\x89"
        path.write_bytes(b"\x80\x02" + bytes(choose(rng, opcodes) for _ in range(400)) + b".")
    elif kind == "pickle inside":
        with zipfile.ZipFile(good / "good.pth") as old, zipfile.ZipFile(path, "w") as new:
            for member in old.infolist():
                content = old.read(member.filename)
                if member.filename.endswith("data.pkl"):
                    content = damage(rng, content)
                new.writestr(member.filename, content)
    elif kind == "npy header":
        path = path.with_suffix(".npz")
        header = io.BytesIO()
        shape = (int(10 ** rng.uniform(8, 15)),)
        fields = {"descr": choose(rng, ["<f4", "|O"]), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        with zipfile.ZipFile(path, "w") as new:
            new.writestr(f"{name}.npy", header.getvalue() + bytes(64))
    elif kind == "msgpack":
        path = path.with_suffix(".msgpack")
        deep = b"\x81\xa1a" * int(rng.integers(500, 100_000)) + b"\x01"
        large = b"\x81\xa1a" + choose(rng, [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"])
        path.write_bytes(choose(rng, [deep, large, damage(rng, deep[:3000] + large)]))
    elif kind == "index":
        path = directory / "model.safetensors.index.json"
        shutil.copy(good / path.name, path)
        damaged_json(rng, path)
    elif kind == "no file":
        shutil.copy(good / "good.pth", path)
        kind += f": {not_a_file(rng, path)}"
    else:  # "bytes": what has no checksums of its own is damaged in its header
        source = choose(rng, ["good.pth", "old.pth", "good.safetensors", "good.npz"])
        path = directory / source
        content = (good / source).read_bytes()
        if source in ("old.pth", "good.safetensors"):
            content = damage(rng, content[:3000]) + content[3000:]
        else:
            content = damage(rng, content)
        path.write_bytes(
            content[: int(rng.integers(1, len(content)))] if rng.random() < 0.3 else content
        )
        kind += f" of {source}"
    return kind, ["convert", str(path), str(directory / "out"), "--no-parity"]


CHECKPOINTS = (
    *(
        "expanded",
        "many expanded",
        "shared",
        "tuples",
        "keys",
        "in disguise",
        "long name",
        "shadowed",
        "pretends",
    ),
    *("zeros", "memory", "code", "deep", "opcodes", "pickle inside", "npy header", "msgpack"),
    *("index", "many files", "no file", "bytes", "bytes", "bytes"),
)


# --- saved models and runs


def saved(rng, directory, good):
    source = choose(rng, ["orbax", "safetensors", "run"])
    model = directory / source
    shutil.copytree(good / source, model)
    files = [path for path in model.rglob("*") if path.is_file()]
    names = ("model.json", "config.json", "checksums.json")
    described = [path for path in files if path.name in names]
    kind = choose(rng, ["json", "json", "json", "no file", "bytes", "names", "checkpoints"])
    if kind == "checkpoints" and source != "run":
        kind = "bytes"
    path = choose(rng, described if rng.random() < 0.7 else files)
    if kind == "json":
        path = choose(rng, described)
        kind += f": {damaged_json(rng, path)}"
    elif kind == "no file":
        kind += f": {not_a_file(rng, path)}"
    elif kind == "bytes":
        path.write_bytes(damage(rng, path.read_bytes()))
    elif kind == "names":
        path = choose(rng, [path for path in described if path.name != "config.json"])
        content = json.loads(path.read_text())
        files = content if path.name == "checksums.json" else content.setdefault("files", {})
        if isinstance(files, dict):
            files[choose(rng, ["../x", "/dev/zero", "a/../../x", "", "\x00", "."])] = "0"
        path.write_text(json.dumps(content))
    else:
        shutil.rmtree(path := model / "checkpoints")
        if rng.random() < 0.5:
            kind += f": {not_a_file(rng, path)}"
        else:
            for name in ("\u00b2", "9" * 200, "1e3"):
                (path / name).mkdir(parents=True)
    where = path.relative_to(model)
    if source == "run" and rng.random() < 0.5:
        command = ["evaluate", str(model), "--batch-size", "16"]
    else:
        command = ["export", str(model), str(directory / "out"), "--format", "safetensors"]
    return f"{source}, {where}: {kind}", command


def architecture(rng, directory, good):
    path = directory / "a.json"
    shutil.copy(good / "channels.json", path)
    kind = damaged_json(rng, path) if rng.random() < 0.8 else not_a_file(rng, path)
    return kind, ["summary", str(path)]


# --- images


def image(rng, directory, good):
    kind = choose(
        rng, ["bomb", "postscript", "height", "bytes", "bytes", "bytes", "no file", "line"]
    )
    path = directory / f"a.{choose(rng, ['png', 'jpg'])}"
    format = choose(rng, ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "PPM", "TGA"])
    content = encode(smooth(60, 80, int(rng.integers(9))), format)
    if kind == "bomb":
        from PIL import Image

        side = int(rng.integers(9_000, 16_000))
        Image.new(choose(rng, ["1", "L", "P"]), (side, side)).save(path, "PNG")
        content = path.read_bytes()
    elif kind == "postscript":
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(evil) (w) file\nshowpage\n"
    elif kind == "height":
        content = encode(smooth(60, 80), "JPEG")
        at = content.index(b"\xff\xc0") + 5
        height = choose(rng, [0, 1, 59, 61, 1000, 65_500])
        content = content[:at] + height.to_bytes(2, "big") + content[at + 2 :]
    elif kind == "line":
        content = encode(np.zeros((int(rng.integers(501, 9000)), 1, 3)), "PNG")
    elif kind == "bytes":
        content = damage(rng, content)
        kind += f" of {format}"
    path.write_bytes(content)
    if kind == "no file":
        kind += f": {not_a_file(rng, path)}"
    if rng.random() < 0.3:
        return kind, ["predict", str(good / "orbax"), str(path), "--image-size", "32"]
    return kind, ["decode", str(path)]


# --- values


def value(rng, directory, good):
    keys = {
        int: (
            *(
                "num_epochs",
                "batch_size",
                "eval_batch_size",
                "eval_every_epochs",
                "log_every_steps",
            ),
            *("checkpoints_to_keep", "profile_steps", "seed", "model.width"),
            *("augment.crop_padding", "step.accumulation_steps"),
        ),
        float: (
            *("optimizer.learning_rate", "optimizer.warmup_epochs", "optimizer.weight_decay"),
            *("optimizer.momentum", "optimizer.clip_norm", "augment.mixup_alpha"),
            *("step.label_smoothing", "step.ema_decay"),
        ),
    }
    kind = choose(rng, [int, float])
    key = choose(rng, keys[kind])
    values = ("-1", str(2**40), "9" * 60) if kind is int else ("-1", "1e308", "-1e308", "nan")
    text = choose(rng, values)
    return f"{key}={text}", ["train", str(directory / "out"), key, text]


GROUPS = (checkpoint, saved, architecture, image, value)


def make(seed, directory, good):
    """What is wrong, and the command that is to open it; it may write `directory / "out"` only."""
    rng = np.random.default_rng(seed)
    group = GROUPS[seed % len(GROUPS)]
    kind, command = group(rng, directory, good)
    return f"{group.__name__}: {kind}", command


# --- what opens them


def decode(path):
    from slimconv_jax.data.sources import ImageFiles
    from slimconv_jax.data.transforms import Transform

    source, transform = ImageFiles([path]), Transform(32)
    transform.for_evaluation(source[0].image, path)
    transform.for_training(source[0].image, path, np.random.default_rng(0))


def train(workdir, key, text):
    from slimconv_jax.training.config import read_config
    from slimconv_jax.training.loop import train

    config = read_config("digits")
    value = int(text) if text.lstrip("-").isdigit() else float(text)
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict({key: value})
    train(config, workdir)


def open_one(command=None, *arguments):
    from slimconv_jax import __main__ as commands
    from slimconv_jax.console import exit_status

    if command is None:
        return 0
    if command in ("decode", "train"):
        return exit_status(lambda: {"decode": decode, "train": train}[command](*arguments))
    return commands.main([command, *arguments])


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        said = io.StringIO()
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = open_one(*json.loads(line))
        except BaseException:
            status = 99
            said.write(traceback.format_exc())
        seconds = time.perf_counter() - start
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = {"status": status, "said": said.getvalue(), "seconds": seconds, "kB": kilobytes}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
