"""What can be trained: new students, and the formats in which they are exported."""
