"""The PyTorch reference as a program to be timed; imports torch at its top, as the reference."""

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
    """The network as its users would run it: channels-last, autocast where not float32.

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
      A function that does rounds and waits for the last, the seconds that the first round
      took to compile (None if it did not), and the peak of the memory that PyTorch allocated, in
      bytes (on a CPU, where it keeps no account, None), parameters and images included.
    """
    on_gpu = device == "cuda"
    if on_gpu:  # as XLA does: algorithms chosen by trial, TF32 for float32
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        before = torch.cuda.memory_allocated()
    compiler = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    if compiled:
        # All programs have the same code, and after eight versions PyTorch would no longer compile.
        torch._dynamo.config.recompile_limit = 1000
    torch.manual_seed(0)
    net = ResNet(config).to(device, memory_format=torch.channels_last)
    # (N, 3, H, W) in the order of channels-last, as it is stored.
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    y = torch.from_numpy(labels).to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    if mode == "inference":
        net.eval()

        def forward():
            with autocast:
                return net(x)

        forward = compiler(forward) if compiled else forward

        def run(rounds: int) -> None:
            with torch.inference_mode():
                for _ in range(rounds):
                    forward()
            synchronize()
    else:
        optimizer = torch.optim.SGD(
            net.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4
        )

        def loss_of():
            with autocast:
                return torch.nn.functional.cross_entropy(net(x), y)

        loss_of = compiler(loss_of) if compiled else loss_of

        def run(rounds: int) -> None:
            for _ in range(rounds):
                optimizer.zero_grad(set_to_none=True)
                loss_of().backward()
                optimizer.step()
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
