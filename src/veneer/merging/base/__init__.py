"""The base of a merge from disk to disk: its files, names and hashes."""
