"""Snapshots: written, signed, published, followed and served."""
