"""Merging an adapter into its base: the arithmetic, and from folder to folder."""
