"""Networks as other people write them."""

from flax import nnx


class VGG(nnx.Module):
    """Someone else's network, plain."""

    def __init__(self, *, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.stages = nnx.List(
            [
                nnx.Conv(16, 24, (3, 3), rngs=rngs),
                nnx.Conv(24, 32, (3, 3), strides=2, padding="VALID", rngs=rngs),
            ]
        )
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.twice = self.stages[1]  # one convolution in two places
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for conv in self.stages:
            x = nnx.relu(conv(x))
        return self.head(self.norm(x).mean(axis=(1, 2)))


class CallTimeMode(nnx.Module):
    """Is told its mode by an argument, and tells it its own batch norm, as many do."""

    def __init__(self, *, rngs):
        self.conv0 = nnx.Conv(3, 16, (1, 1), rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, deterministic=False, rngs=rngs)
        self.out = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, training=False):
        x = self.conv(self.conv0(x))
        x = nnx.relu(self.bn(x, use_running_average=not training))
        return self.out(self.dropout(x.mean((1, 2)), deterministic=not training))


class Wrapped(nnx.Module):
    """Tells its mode to a part, of which an argument by place says the opposite."""

    def __init__(self, *, rngs):
        self.inner = Inner(rngs=rngs)

    def __call__(self, x, train):
        return self.inner(x, not train)


class Inner(nnx.Module):
    """As `CallTimeMode`, with the mode that Dropout has."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 16, (1, 1), rngs=rngs)
        self.conv3x3 = nnx.Conv(16, 16, (3, 3), rngs=rngs)

    def __call__(self, x, deterministic):
        return self.encode(x, deterministic).mean((1, 2))

    def encode(self, x, deterministic=True):
        """Is called by itself, too."""
        return self.conv3x3(self.conv(x))


class ModeInAttribute(nnx.Module):
    """Keeps its mode in an attribute of its own."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.conv1 = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(16, rngs=rngs)
        self.is_training = False

    def __call__(self, x):
        return self.bn(self.conv1(self.conv(x)), use_running_average=not self.is_training)


class Synchronised(nnx.Module):
    """Its batch norm takes the devices' inputs for one batch."""

    def __init__(self, *, rngs):
        self.conv0 = nnx.Conv(3, 16, (1, 1), rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(16, axis_name="batch", momentum=0.7, epsilon=1e-3, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(self.conv0(x)))).mean((1, 2))
