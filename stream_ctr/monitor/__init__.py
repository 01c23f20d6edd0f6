"""What can be seen of a run from outside: its newest reports, for pages, probes and Prometheus."""
