"""Stage 3: the teachers of a run, the targets, what a student learns from them, and its runs."""
