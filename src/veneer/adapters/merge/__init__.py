"""Merging and combining adapters in memory."""
