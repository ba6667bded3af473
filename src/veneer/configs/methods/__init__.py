"""The config of each method, in a file named by its ``peft_type``. None needs torch."""
