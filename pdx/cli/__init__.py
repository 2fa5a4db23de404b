"""The command line: it reads arguments and prints text. The work is done by functions that Python code can call too.

Each file holds a group of commands. A command imports jax and the model code itself, so that `pdx --help` is fast.
"""

try:
    from pdx.cli import bench, distill, doctor, generate, kernels, load, models, plan, report, serving
    from pdx.cli.app import app, main
except KeyboardInterrupt:  # Ctrl-C during these imports, before `main` can handle it
    import os
    import sys

    if os.path.basename(sys.argv[0]) not in ("pdx", "pdx.exe", "-m", "__main__.py"):
        raise
    os.write(2, b"interrupted\n")
    os._exit(130)

__all__ = [
    "app",
    "bench",
    "distill",
    "doctor",
    "generate",
    "kernels",
    "load",
    "main",
    "models",
    "plan",
    "report",
    "serving",
]
