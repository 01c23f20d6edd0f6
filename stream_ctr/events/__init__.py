"""Decode records into columns of events, and hash their features into ids."""
