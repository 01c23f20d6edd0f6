"""Wire bytes to columns, columns to ids."""
