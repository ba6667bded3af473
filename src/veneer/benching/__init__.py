"""``veneer bench``: what merging an adapter would change on this machine, measured, and whether to do it."""
