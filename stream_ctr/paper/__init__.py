"""`stream-ctr paper`: the tables and figures of the DeepFM paper (Guo et al., IJCAI 2017), repeated on one's own log.

    a log -> dataset (columns on disk, split) -> plan: which runs -> experiment: one run -> report.{json,md,html}

Here, and only here, examples are seen more than once and in shuffled order, as the paper does. What a run is made of - joiner, hasher,
learner, the nine systems - is what learns from a stream.
"""
