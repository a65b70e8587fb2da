"""What is on disk: files, checkpoints, saved models, the directories of runs."""
