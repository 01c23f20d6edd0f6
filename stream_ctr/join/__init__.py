"""Impressions and clicks to labelled examples."""
