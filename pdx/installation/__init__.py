"""What is installed, and where pdx keeps its files. Nothing here imports jax when it is imported."""
