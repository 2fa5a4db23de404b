"""The command line: arguments in, text out. Everything it does is a call that Python can make too.

A file a group of commands. jax and the model code are imported by the command that needs them, so that `pdx --help`
answers at once.
"""

try:
    from pdx.cli import bench, doctor, generate, kernels, load, models, plan, report, serving
    from pdx.cli.app import app, main
except KeyboardInterrupt:  # nothing has begun yet, and nobody is there to catch it
    import os
    import sys

    if os.path.basename(sys.argv[0]) not in ("pdx", "pdx.exe", "-m", "__main__.py"):
        raise
    os.write(2, b"interrupted\n")
    os._exit(130)

__all__ = ["app", "bench", "doctor", "generate", "kernels", "load", "main", "models", "plan", "report", "serving"]
