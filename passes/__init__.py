"""The rewrites: one pass a file."""
