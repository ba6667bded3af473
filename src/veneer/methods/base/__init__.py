"""What every method is made of: the abstract classes, and the parts that come along with an adapter."""
