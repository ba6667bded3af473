"""Gives the base class of configs under its former path, which recorded scripts and pickled models name."""

from veneer.configs.base import PeftConfig as PeftConfig
