"""Adapter files of other tools: a file for each format, which recognises, reads and writes it."""
