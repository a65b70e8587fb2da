"""The models: pure Flax NNX, no data, no training, no torch."""
