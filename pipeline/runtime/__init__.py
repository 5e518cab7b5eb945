"""The process and its surroundings: messages, progress, failures, interrupts, threads, the machine, other ranks."""
