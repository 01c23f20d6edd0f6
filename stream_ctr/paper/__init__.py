"""`stream-ctr paper`: repeat the tables and figures of the DeepFM paper on a log.

The paper is Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction",
IJCAI 2017.

    log -> dataset (columns on disk, split) -> plan (which runs) -> experiment (one run)
        -> aggregate (means, intervals) -> report.json -> report.md, report.html

Only this folder learns from examples more than once and in shuffled order, as the paper does. A run
uses the same joiner, hasher, learner and systems as a run on a stream.
"""
