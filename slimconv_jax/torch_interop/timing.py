"""The PyTorch reference as a program to be timed; imports torch at its top, like the reference."""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from slimconv_jax.models.resnet import ResNetConfig
from slimconv_jax.torch_interop.reference import ResNet


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_program(
    config: ResNetConfig,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    mode: str,
    dtype: str,
    compiled: bool,
    device: str,
) -> tuple[Callable[[int], None], float | None, int | None]:
    """Builds the network as its users would run it: channels-last, autocast where not float32.

    Args:
      config: the architecture; its parameters are random.
      images: (N, H, W, 3), float32.
      labels: (N,), integers.
      mode: "inference" in evaluation mode; "train", forward, backward, and SGD with Nesterov
        momentum and weight decay.
      dtype: "float32", or "bfloat16" for autocast.
      compiled: whether to use `torch.compile`.
      device: "cpu" or "cuda".

    Returns:
      A function that runs a number of rounds and waits for the last; the seconds that the first
      round took to compile (None if it did not); and the peak of the memory that PyTorch
      allocated, in bytes, parameters and images included (None on a CPU, where PyTorch does not
      count).
    """
    on_gpu = device == "cuda"
    if on_gpu:  # as XLA does: algorithms chosen by trial, TF32 for float32
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        before = torch.cuda.memory_allocated()
    if compiled:
        # All programs have the same code, and after eight versions PyTorch would no longer compile.
        torch._dynamo.config.recompile_limit = 1000
    torch.manual_seed(0)
    net = ResNet(config).to(device, memory_format=torch.channels_last)
    # (N, 3, H, W) in the order of channels-last, as it is stored.
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    y = torch.from_numpy(labels).to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    training = mode == "train"
    net.train(training)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4
    )

    @functools.partial(torch.compile, dynamic=False, fullgraph=True, disable=not compiled)
    def forward():
        with autocast:
            return torch.nn.functional.cross_entropy(net(x), y) if training else net(x)

    def run(rounds: int) -> None:
        with torch.inference_mode(not training):
            for _ in range(rounds):
                if training:
                    optimizer.zero_grad(set_to_none=True)
                    forward().backward()
                    optimizer.step()
                else:
                    forward()
        synchronize()

    start = time.perf_counter()
    run(1)
    first = time.perf_counter() - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run(1)
    second = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return run, first - second if compiled else None, memory
