"""From sources to uint8 batches on the devices; most of it NumPy, on the host."""
