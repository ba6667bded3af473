"""An adapter on disk against a base: what it holds, where its tensors go, which base it is for."""
