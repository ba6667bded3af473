"""Finds the files behind a path or hub id, and reads their headers. Imports no torch before a tensor is read."""
