"""Benchmarks.

- `quality`: logloss and AUC on simulated and public data
- `speed`: throughput compared with other libraries
- `systems`: the paper's nine models compared with other implementations
- `step`: the time of a training step, by stage
- `pause`: the time for which a snapshot stops the learner
- `deltas`: sizes, parts, cost and delay of deltas
- `freshness`: what it is worth to publish more often
"""
