"""Plans the work that a merge from disk to disk does for each tensor, before anything is written."""
