"""What can be read off a compiled program and a jaxpr, for tests of any step."""

from __future__ import annotations

import re

import jax
from jax.extend import core


def aliased_parameters(compiled) -> set[int]:
    """Numbers of the arguments whose memory the program gives to one of its results."""
    header = compiled.as_text().split("\n", 1)[0]
    found = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header)
    return {int(n) for n in re.findall(r": \((\d+), \{", found.group(1))} if found else set()


def parameters(compiled, name: str) -> dict[int, str]:
    """Arguments of the entry computation whose name begins with `name`: number -> name."""
    entry = compiled.as_text().split("\nENTRY ", 1)[1]
    found = re.findall(r"%(\w[\w.]*) = [^\n]*? parameter\((\d+)\)", entry)
    return {int(n): text for text, n in found if text.startswith(name)}


def check_in_place(compiled, name: str, abstract) -> None:
    """AssertionError unless every leaf of argument `name` (`abstract`: its leaves) is updated where it lies.

    Three ways to look: the program says that it reuses the memory; it needs less memory of its own than the
    largest leaf has; and no instruction copies an array of a large leaf's shape.
    """
    leaves = jax.tree.leaves(abstract)
    wanted, given = parameters(compiled, name), aliased_parameters(compiled)
    assert len(wanted) == len(leaves), f"{name} has {len(leaves)} leaves, the program takes {sorted(wanted.values())}"
    missing = [text for n, text in wanted.items() if n not in given]
    assert not missing, f"not reused: {missing}"
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(sizes), f"{memory.alias_size_in_bytes} of {sum(sizes)} bytes are reused"
    largest = max(sizes)
    assert memory.temp_size_in_bytes < largest, (
        f"{memory.temp_size_in_bytes} bytes of temporaries could hold a leaf of {largest}"
    )
    shapes = {",".join(map(str, x.shape)) for x, size in zip(leaves, sizes, strict=True) if size == largest}
    for line in compiled.as_text().splitlines():
        copied = re.search(r"= \w+\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", line)
        assert not (copied and copied.group(1) in shapes), f"a whole leaf is copied: {line.strip()[:200]}"


def equations(jaxpr, primitive: str):
    """All equations of a primitive, inside of loops, branches and inner functions too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == primitive:
            yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            if isinstance(inner, core.ClosedJaxpr):
                inner = inner.jaxpr
            if isinstance(inner, core.Jaxpr):
                yield from equations(inner, primitive)
