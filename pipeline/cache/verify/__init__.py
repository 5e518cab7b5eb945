"""Is a cache whole and true? Files against checksums, features against the teacher, and repair."""
