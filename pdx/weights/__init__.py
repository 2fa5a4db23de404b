"""Finding, fetching, reading and saving models. Only `load` and `checkpoint` import jax."""
