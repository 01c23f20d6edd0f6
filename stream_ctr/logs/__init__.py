"""Historical logs, read as a stream of events in event-time order."""
