"""The trainer: one loop from a source to published snapshots."""
