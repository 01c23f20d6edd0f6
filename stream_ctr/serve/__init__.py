"""Predictions over HTTP: features in, probabilities and the id of their snapshot out."""
