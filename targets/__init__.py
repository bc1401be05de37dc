"""One runtime or chip a file; the file's name is the target's name."""
