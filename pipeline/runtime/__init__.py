"""The process and its surroundings: messages, progress, failures, the machine, other ranks."""
