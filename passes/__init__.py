"""One rewrite or decision a file; the file's name is the pass's name."""
