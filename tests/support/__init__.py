"""What several tests share: builders, brokers, and ways to wait."""
