"""The modules that stand in the places of a base model's layers."""
