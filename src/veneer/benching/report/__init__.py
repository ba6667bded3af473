"""Shows a run to people: on the terminal, as HTML and as Markdown, all from the same tables."""
