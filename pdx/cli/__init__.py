"""The command line: arguments in, text out. Everything it does is a call that Python can make too.

A file a group of commands. jax and the model code are imported by the command that needs them, so that `pdx --help`
answers at once.
"""

try:
    from pdx.cli import bench, generate, kernels, load, models, plan, report, serving
    from pdx.cli.app import app, main
except KeyboardInterrupt:  # the imports take a third of a second, in which nothing has begun yet
    import sys

    sys.exit(sys.stderr.write("interrupted\n") and 130)

__all__ = ["app", "bench", "generate", "kernels", "load", "main", "models", "plan", "report", "serving"]
