"""The demo: a small real model, three adapters trained on it, and a script that shows what Veneer does with them."""
