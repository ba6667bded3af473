"""Deciding: what the measurements say about merging."""
