"""What can be cached: models and their weights."""
