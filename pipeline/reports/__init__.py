"""One HTML page about some runs: what was trained on what, what came of it and what it looks like."""
