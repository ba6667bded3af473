"""What a merge from disk to disk does to each tensor, planned before anything is written."""
