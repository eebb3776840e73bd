"""What happened: the log, its store and its schema. The leftmost folder, which reads no other."""
