"""Learners: a model, its embedding table and their optimisers, one step a batch."""
