"""What the documents show, run: the README's ten lines and the notebooks, on the real default model."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def functional_api() -> str:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"## The functional API in ten lines\n+```python\n(.*?)```", readme, re.S).group(1)


def test_the_api_is_shown_in_ten_lines():
    assert len([line for line in functional_api().splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.real
def test_the_readmes_python_runs():
    """Block after block in one namespace: the ten lines, then the engine on the model that they loaded."""
    readme, names = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "README.md", "exec"), names)
        assert out.getvalue().startswith(" Paris")


def test_notebooks_are_clean():
    nbformat = pytest.importorskip("nbformat")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert not cell.outputs, f"{path.name} carries outputs"
                assert not re.search(r"^\s*(def|class) ", cell.source, re.M), f"{path.name} defines things of its own"


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert "The capital of France is Paris" in text
    assert "TTFT" in text
    assert any("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
