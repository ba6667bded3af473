"""The model object that users hold, and every way to get one."""
