"""What a run writes: cached data, metrics, trackers."""
