"""The base model: its modules, those of them that can carry an adapter, and the calls of its forward pass."""
