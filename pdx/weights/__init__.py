"""Finding, fetching, reading and saving models.

Only `load`, `loaded`, `checkpoint` and `opening` import jax, so that finding and listing models stay fast.
"""
