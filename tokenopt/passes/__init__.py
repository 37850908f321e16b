"""One pass per file."""
