"""Benchmarks: how good (`quality`), how fast (`speed`), and for how long a snapshot keeps the learner waiting (`pause`)."""
