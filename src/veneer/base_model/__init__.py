"""The base model: its modules, which of them can carry an adapter, and how its forward pass is called."""
