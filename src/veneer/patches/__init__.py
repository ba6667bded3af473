"""What an adapter means for one layer: a patch, applied to inputs, to rows of a batch, or put into a weight."""
