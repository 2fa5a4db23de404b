"""The installed packages and devices, and the folders of pdx. Importing these modules does not import jax."""
