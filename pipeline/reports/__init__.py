"""One HTML page about some runs: students, their teachers, their figures and their features."""
