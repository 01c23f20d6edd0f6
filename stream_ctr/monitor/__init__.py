"""A run, watched: what its port answers, and the live page."""
