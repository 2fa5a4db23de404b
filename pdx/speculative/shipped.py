"""The draft models and heads that come with pdx, by target. No jax.

They lie in `drafts/TARGET/draft` and `drafts/TARGET/eagle`, each with a README.md that says how it was made.
"""

from __future__ import annotations

from pathlib import Path

from pdx.errors import RequestError

FOLDER = Path(__file__).with_name("drafts")


def names() -> dict[str, list[str]]:
    """What there is for each target: `draft`, `eagle`.

    >>> sorted(names())
    ['smollm2-135m-instruct']
    """
    kinds = sorted(file.parent for file in FOLDER.glob("*/*/pdx.json"))
    return {target: [k.name for k in kinds if k.parent.name == target] for target in {k.parent.name for k in kinds}}


def find(target: str, kind: str) -> Path:
    """The folder of the `draft` or `eagle` of a target by its name. Raises RequestError, with what there is."""
    there = names()
    if kind in there.get(target, ()):
        return FOLDER / target / kind
    known = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in sorted(there.items())) or "none"
    raise RequestError(
        f"speculate {kind!r}: none comes with pdx for {target} (there are {known}). `pdx distill` makes one: name it, "
        f"{kind}:PATH"
    )
