"""Writes the folder of a merge from disk to disk, and restores the base from one."""
