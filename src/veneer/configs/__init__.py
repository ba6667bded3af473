"""``adapter_config.json`` and the dataclass of each method. Imports no torch."""
