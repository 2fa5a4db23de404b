"""Instruments: what kernels move, need and take, counted and compiled without their chips, or timed on them."""
