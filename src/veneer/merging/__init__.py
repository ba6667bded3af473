"""Merges adapters into a base from disk to disk, verifies and undoes a merge, and extracts adapters."""
