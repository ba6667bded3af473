"""Tells what is at a path, from configs and headers: facts and problems, as data and as a panel."""
