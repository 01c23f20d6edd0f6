"""The processes of one run: what they send each other, and how rank 0 leads the others."""
