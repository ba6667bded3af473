"""Layers whose weights are stored quantised, by the library that packed them."""
