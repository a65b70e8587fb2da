"""From sources to uint8 batches on the devices; most of it runs in NumPy, on the host."""
