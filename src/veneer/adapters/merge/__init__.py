"""Merges and combines adapters in memory."""
