"""The paged cache: its format, and what writes and gathers it."""
