"""The process and its surroundings: messages, progress, failures, background threads, the machine, other ranks."""
