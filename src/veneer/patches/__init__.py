"""Patches: an adapter's change of one layer, applied to inputs and to rows of a batch, or merged into a weight."""
