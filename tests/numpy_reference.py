"""SlimConv and the ResNets in plain NumPy and float64, written from the paper's text.

Slow, explicit, and independent of the package: only the parameters come from its models.
`params` are nested dicts of arrays as `nnx.to_pure_dict` gives them, batch statistics merged in.
"""

import numpy as np
from flax import nnx


def parameters(model: nnx.Module) -> dict:
    """All arrays of a model in float64."""

    def convert(node):
        if isinstance(node, dict):
            return {key: convert(value) for key, value in node.items()}
        return np.asarray(node, np.float64)

    return convert(nnx.to_pure_dict(nnx.state(model)))


def relu(x):
    return np.maximum(x, 0)


def conv(x, kernel, strides=1, dilation=1, groups=1):
    """(N, H, W, C) by (k, k, C / groups, O), padded by dilation * (k - 1) / 2 on each side."""
    size, _, group_in, out_features = kernel.shape
    pad = dilation * (size - 1) // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    span = dilation * (size - 1) + 1
    height, width = ((side - span) // strides + 1 for side in x.shape[1:3])
    group_out = out_features // groups
    y = np.zeros((x.shape[0], height, width, out_features))
    for g in range(groups):
        inputs = x[..., g * group_in : (g + 1) * group_in]
        outputs = slice(g * group_out, (g + 1) * group_out)
        for i in range(size):
            for j in range(size):
                rows = slice(i * dilation, i * dilation + (height - 1) * strides + 1, strides)
                columns = slice(j * dilation, j * dilation + (width - 1) * strides + 1, strides)
                y[..., outputs] += inputs[:, rows, columns] @ kernel[i, j, :, outputs]
    return y


def batch_norm(x, p, train=False):
    mean, var = p["mean"], p["var"]
    if train:
        axes = tuple(range(x.ndim - 1))
        mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]


def conv_bn(x, p, train=False, **settings):
    return batch_norm(conv(x, p["conv"]["kernel"], **settings), p["bn"], train)


def slimconv(
    x, p, reduction, strides=1, dilation=1, groups=1, lower_groups=1, train=False, gating="flipped"
):
    channels = x.shape[-1]
    a = channels // reduction

    # Reconstruct.
    if gating is None:
        w = np.ones((x.shape[0], channels))
    else:
        squeezed = x.mean(axis=(1, 2)) @ p["gate"]["squeeze"]["kernel"]
        squeezed = relu(batch_norm(squeezed, p["gate"]["bn"], train))
        logits = squeezed @ p["gate"]["excite"]["kernel"] + p["gate"]["excite"]["bias"]
        w = 1 / (1 + np.exp(-logits))
    upper = lower = 0
    for chunk in range(reduction):
        for c in range(a):
            channel = chunk * a + c
            other = channels - 1 - channel if gating == "flipped" else channel
            weight = w[:, channel, None, None], w[:, other, None, None]
            if gating == "upper":
                weight = weight[0], 1.0
            one = np.eye(a)[c]
            upper = upper + (weight[0] * x[..., channel])[..., None] * one
            lower = lower + (weight[1] * x[..., channel])[..., None] * one

    # Transform.
    both = {"strides": strides, "dilation": dilation, "train": train}
    upper = conv_bn(upper, p["upper"], groups=groups, **both)
    lower = relu(conv_bn(lower, p["lower_reduce"], train))
    lower = conv_bn(lower, p["lower"], groups=lower_groups, **both)

    # Fuse.
    return np.concatenate([upper, lower], axis=-1)


def max_pool(x):
    """3x3 at stride 2, padding 1."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    height, width = ((side - 3) // 2 + 1 for side in x.shape[1:3])
    windows = [
        x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(windows, axis=0)


def resnet(x, p, *, reduction, groups=1, lower_groups=None, stem="imagenet", basic=False):
    """Logits of a network in evaluation mode, without dilation."""
    if stem == "imagenet":
        x = max_pool(relu(conv_bn(x, p["stem"], strides=2)))
    else:
        x = relu(conv_bn(x, p["stem"]))
    for stage, blocks in sorted(p["stages"].items()):
        for index, block in sorted(blocks.items()):
            strides = 2 if stage > 0 and index == 0 else 1
            if basic:
                y = relu(conv_bn(x, block["conv1"], strides=strides))
                y = conv_bn(y, block["conv2"])
            else:
                y = relu(conv_bn(x, block["conv1"]))
                if reduction is None:
                    y = conv_bn(y, block["conv2"], strides=strides, groups=groups)
                else:
                    lower = groups if lower_groups is None else lower_groups
                    y = slimconv(y, block["conv2"], reduction, strides, 1, groups, lower)
                y = conv_bn(relu(y), block["conv3"])
            if "shortcut" in block:
                x = conv_bn(x, block["shortcut"], strides=strides)
            x = relu(x + y)
    return x.mean(axis=(1, 2)) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
