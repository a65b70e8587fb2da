"""The family in PyTorch, with the names of the released files, to compare with.

It was written from the paper, not from the Flax modules, so that an error in one of the two shows.
It imports torch at its top: import it only when needed.
"""

import torch
from torch import nn

from slimconv_jax.models.resnet import ResNetConfig


def _conv(in_channels, out_channels, size, stride=1, dilation=1, groups=1):
    padding = dilation * (size // 2)
    return nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, groups, bias=False)


def _conv_bn(in_channels, out_channels, size, stride=1, dilation=1, groups=1):
    conv = _conv(in_channels, out_channels, size, stride, dilation, groups)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class SlimConv(nn.Module):
    """Gate, fold twice, convolve both halves (paper, section III), for (N, C, H, W)."""

    def __init__(self, channels, stride, dilation, config):
        super().__init__()
        self.reduction, self.gating = config.reduction, config.gating
        upper, lower = channels // config.reduction, channels // (2 * config.reduction)
        upper_groups, lower_groups = config.groups, config.lower_groups or config.groups
        self.conv2_1 = _conv_bn(upper, upper, 3, stride, dilation, upper_groups)
        self.conv2_2 = nn.Sequential(
            *_conv_bn(upper, lower, 1),
            nn.ReLU(),
            *_conv_bn(lower, lower, 3, stride, dilation, lower_groups),
        )
        if config.gating is not None:
            squeezed = max(channels // config.squeeze_ratio, config.min_squeezed)
            self.fc = nn.Sequential(
                *_conv_bn(channels, squeezed, 1),
                nn.ReLU(),
                nn.Conv2d(squeezed, channels, 1),
                nn.Sigmoid(),
            )

    def forward(self, x):
        upper = lower = x
        if self.gating is not None:
            weights = self.fc(x.mean((2, 3), keepdim=True))
            upper = weights * x
            lower = {"flipped": weights.flip(1), "plain": weights, "upper": 1}[self.gating] * x
        chunk = x.shape[1] // self.reduction
        upper, lower = (sum(y.split(chunk, dim=1)[: self.reduction]) for y in (upper, lower))
        return torch.cat([self.conv2_1(upper), self.conv2_2(lower)], dim=1)


class GhostModule(nn.Module):
    """A convolution makes half of the channels, a depthwise one of these the rest (GhostNet)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__()
        half = out_channels // 2
        self.primary_conv = _conv_bn(in_channels, half, kernel_size, stride)
        self.cheap_operation = _conv_bn(half, half, 3, groups=half)

    def forward(self, x):
        x = self.primary_conv(x)
        return torch.cat([x, self.cheap_operation(x)], dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels, channels, stride, dilation, config, stage):
        super().__init__()
        planes = self.out_channels = channels[-1]
        self.conv1 = _conv(in_channels, planes, 3, stride, dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(in_channels, self.out_channels, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 convolution, SlimConv or 3x3 convolution, 1x1 convolution, and a shortcut."""

    def __init__(self, in_channels, channels, stride, dilation, config, stage):
        super().__init__()
        width, inner, self.out_channels = channels
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        if config.reduction is None or not config.sc_stages[stage]:
            self.conv2 = _conv(width, inner, 3, stride, dilation, config.groups)
            self.bn2 = nn.BatchNorm2d(inner)
        else:
            self.conv2 = SlimConv(width, stride, dilation, config)
            inner = width // config.reduction + width // (2 * config.reduction)
            self.bn2 = nn.Identity()
        self.conv3 = _conv(inner, self.out_channels, 1)
        self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.se = SqueezeExcite(self.out_channels) if config.block == "se" else nn.Identity()
        self.downsample = _downsample(in_channels, self.out_channels, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.se(self.bn3(self.conv3(y))) + self.downsample(x))


class SqueezeExcite(nn.Module):
    """One weight per channel from the channels' averages (Hu et al., 2018)."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(channels // 16, 1), 1)
        self.fc2 = nn.Conv2d(max(channels // 16, 1), channels, 1)

    def forward(self, x):
        return self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid() * x


class GhostBottleneck(nn.Module):
    """A bottleneck whose convolutions are ghost modules."""

    def __init__(self, in_channels, channels, stride, dilation, config, stage):
        super().__init__()
        first, second, self.out_channels = channels
        self.conv1 = GhostModule(in_channels, first, 1)
        self.conv2 = GhostModule(first, second, 3, stride)
        self.conv3 = GhostModule(second, self.out_channels, 1)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != self.out_channels:
            self.downsample = GhostModule(in_channels, self.out_channels, 1, stride)

    def forward(self, x):
        y = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return torch.relu(self.conv3(y) + self.downsample(x))


def _channels(config, stage, index):
    """Works out the output channels of a block's convolutions from the numbers of the config."""
    if config.channels is not None:
        return [max(c * config.width // 64, 1) for c in config.channels[1][stage][index]]
    planes = config.width * 2**stage
    if config.block == "basic":
        return [planes, planes]
    width = int(planes * config.base_width / 64) * config.groups
    return [width, width, 4 * planes]


def _downsample(in_channels, out_channels, stride):
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return _conv_bn(in_channels, out_channels, 1, stride)


class ResNet(nn.Module):
    """A ResNet or Sc-ResNet for images (N, 3, H, W), as `config` says.

    Its parameters are not initialised as in training: load a state dict.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        channels = config.width
        if config.channels is not None:
            channels = max(config.channels[0] * config.width // 64, 1)
        if config.stem == "imagenet":
            self.conv1 = _conv(3, channels, 7, stride=2)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = _conv(3, channels, 3)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(channels)
        special = {"basic": BasicBlock, "ghost": GhostBottleneck}
        block_type = special.get(config.block, Bottleneck)
        dilation = 1
        for stage, count in enumerate(config.blocks):
            stride, first_dilation = (1 if stage == 0 else 2), dilation
            if stage > 0 and config.dilation[stage - 1]:
                stride, dilation = 1, dilation * stride
            blocks = []
            for index in range(count):
                setting = (stride, first_dilation) if index == 0 else (1, dilation)
                outputs = _channels(config, stage, index)
                blocks.append(block_type(channels, outputs, *setting, config, stage))
                channels = blocks[-1].out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, config.num_classes) if config.num_classes else nn.Identity()

    def activations(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Computes the outputs of the stem (before the pool) and each stage, and the logits."""
        stages = {"stem": torch.relu(self.bn1(self.conv1(x)))}
        y = self.maxpool(stages["stem"])
        for stage in (1, 2, 3, 4):
            y = stages[f"stage {stage}"] = getattr(self, f"layer{stage}")(y)
        stages["logits"] = self.fc(y.mean((2, 3)))
        return stages

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes the logits (N, num_classes)."""
        return self.activations(x)["logits"]
