"""The cost of a cache, measured before the cache is made."""
