"""The names of `import pdx` as type checkers see them: all are there, a right program is clean, a wrong one is not."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pdx

ROOT = Path(__file__).parents[2]

RIGHT = """
import numpy as np
import jax.numpy as jnp

import pdx
from pallas_kernels import decode_attention, quantized_matmul, QuantArray


def mine(q, k, v, starts, lengths, scale):
    return q


model = pdx.load("smollm2-135m-instruct", dtype="auto")
done = pdx.generate(model, ["a", "b"], pdx.SamplingOptions(max_tokens=3), kernels={"decode_attention": mine})
text: str = done[0].text
for piece in pdx.stream(model, "a", max_tokens=3):
    print(piece.text)
cache = pdx.init_cache(model.config, 1, 64)
logits, cache = pdx.prefill(model.params, model.config, jnp.zeros((1, 4), int), jnp.array([4]), cache, kernels="xla")
logits, cache = pdx.decode_step(model.params, model.config, jnp.array([1]), jnp.array([True]), cache)
q = jnp.ones((1, 1, 4, 8))
out = decode_attention(q, q, q, starts=jnp.array([0]), lengths=None, scale=1.0, implementation=mine)
found = pdx.compare(["decode_attention"], extra={"mine": mine}, targets=[])
found.rows[0].seconds
"""

WRONG = """
import pdx

model = pdx.load("x")
pdx.stream(model, "a", kernels="cuda")
pdx.prefill(model.params, model.config, "tokens", None, None)
pdx.SamplingOptions(max_tokens="three")
pdx.no_such_name
"""


def test_type_checkers_see_every_name_where_it_is():
    stub = (ROOT / "pdx" / "__init__.pyi").read_text(encoding="utf-8")
    seen = {name: where for where, name in re.findall(r"^from (\S+) import (\w+) as \2$", stub, re.MULTILINE)}
    assert seen == pdx._WHERE
    assert (ROOT / "pdx" / "py.typed").exists()
    assert (ROOT / "pallas_kernels" / "py.typed").exists()


def test_mypy_checks_the_bodies_of_every_module_that_users_import():
    """`.ci/run` calls mypy, which takes its files from pyproject.toml."""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["files"]
    source = (ROOT / "pallas_kernels" / "__init__.py").read_text(encoding="utf-8")
    kernels = re.findall(r"^from (\S+) import", source, re.MULTILINE)
    assert len(kernels) > 5
    for module in {*pdx._WHERE.values(), *kernels}:
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert path.exists()
        assert any(path.is_relative_to(ROOT / name) for name in files), path
    assert all((ROOT / name).exists() for name in files)


def checked(tmp_path, text: str) -> subprocess.CompletedProcess:
    """What mypy says of a user's program; of the packages' own bodies it is not asked."""
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), "program.py"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}  # it does not follow the hooks of an editable installation
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_users_program_is_clean(tmp_path):
    done = checked(tmp_path, RIGHT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_program_is_not(tmp_path):
    said = checked(tmp_path, WRONG).stdout
    for line, what in ((5, "kernels"), (6, "tokens"), (7, "max_tokens"), (8, "no_such_name")):
        assert re.search(rf"program.py:{line}: error: ", said), (what, said)
