"""Gives the adapted layer under its former path, which recorded scripts and pickled models name."""

from veneer.layers.adapted_layer import AdaptedLayer as AdaptedLayer
