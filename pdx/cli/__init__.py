"""The command line: arguments in, text out. Everything it does is a call that Python can make too.

A file a group of commands. jax and the model code are imported by the command that needs them, so that `pdx --help`
answers at once.
"""

from pdx.cli import bench, doctor, generate, kernels, load, models, plan, report, serving
from pdx.cli.app import app, main

__all__ = ["app", "bench", "doctor", "generate", "kernels", "load", "main", "models", "plan", "report", "serving"]
