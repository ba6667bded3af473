"""A run as people read it: on the terminal, as HTML and as Markdown. All of it from the same tables."""
