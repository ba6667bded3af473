"""A path or hub id, and the files and headers behind it. Imports no torch."""
