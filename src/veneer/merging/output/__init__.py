"""The folder that a merge from disk to disk writes, and taking a merge back."""
