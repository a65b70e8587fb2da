"""The host side: NumPy arrays in, uint8 batches out; JAX only places them on devices."""
