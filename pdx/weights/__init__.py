"""Finding, fetching, reading and saving models.

jax is imported by `load`, `loaded`, `checkpoint` and `opening` only: finding and listing answer without it.
"""
