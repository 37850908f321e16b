"""Vocabulary 1: reductions, as score x select x fuse x restore at a place."""
