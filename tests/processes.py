"""What a program of ours, run by a test in a process of its own, has said."""

NOISE = ("cudart_stub.cc", "All log messages before absl::InitializeLog()")
"""JAX with its CUDA plugin says so where there is no GPU, and cannot be told not to."""


def own_errors(stderr: str) -> str:
    """What is on its standard error, less the noise."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not any(words in line for words in NOISE))
