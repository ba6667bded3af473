"""The config of each method, in a file named by its ``peft_type``: ``CONFIG`` is the class. None needs torch."""
