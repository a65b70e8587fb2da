"""Evaluation, prediction and export of saved models."""
