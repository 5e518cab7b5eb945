"""Stage 2: fit the refiners of a cache, store them, and open them again."""
