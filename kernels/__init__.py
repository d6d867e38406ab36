"""Compiled kernels: arrays in, arrays out, no knowledge of graphs."""
