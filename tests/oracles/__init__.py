"""Definitions as NumPy float64 token loops, written from the papers and not from the code."""
