"""Files on disk: checkpoints, saved models and the work directories of runs."""
