"""PyTorch checkpoints in, PyTorch checkpoints out; torch is imported only when needed."""
