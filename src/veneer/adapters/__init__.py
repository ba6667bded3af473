"""The set of adapters on a model in memory: add, select, remove, merge."""
