"""One HTML page about some runs: students, their teachers, their figures and their features."""

# The value of a page's meta tag `generator`; a file without it is never overwritten.
GENERATOR = "singer report"
