"""Seeing what the passes did: traces, diffs, bisection, numerics, repros and the viewer, all read off the record."""
