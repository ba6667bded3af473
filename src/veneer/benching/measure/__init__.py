"""Measuring: workloads, rounds, fresh processes, statistics."""
