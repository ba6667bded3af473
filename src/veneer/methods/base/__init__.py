"""The abstract classes of methods, and the methods that come along with any adapter."""
