"""Verify and repair a cache: compare its files with checksums, and its features with those of the teacher."""
