"""Finds the files behind a path or hub id, and reads their headers. Imports no torch."""
