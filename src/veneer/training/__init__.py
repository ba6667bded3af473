"""What a training script calls beside the model: optimisers, EVA, LoftQ on quantised bases."""
