"""One file a command, which reads top to bottom."""
