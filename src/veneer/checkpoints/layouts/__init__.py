"""Reads checkpoints of older versions and of other writers in the layout of the model at hand."""
