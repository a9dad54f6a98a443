"""Arrays on disk: a run's state, written whole or not at all."""
