"""Helps training scripts: optimisers, EVA, LoftQ on quantised bases."""
