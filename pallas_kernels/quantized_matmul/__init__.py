"""Activations times quantized weights: W8A16, W8A8 and W4A16."""
