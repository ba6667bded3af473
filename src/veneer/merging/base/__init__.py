"""Reads the base of a merge from disk to disk: its files, names, model and hashes."""
