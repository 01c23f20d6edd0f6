"""Progressive metrics, and the gate that decides whether a snapshot may be published."""
