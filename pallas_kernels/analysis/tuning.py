"""Makes the tables of tiles that `tiles.resolve` reads.

    python -m pallas_kernels.analysis.tuning decode_attention --target v5e [--case NAME] [--write] [--folder DIR]

measures on the device if this process has that chip. Elsewhere it ranks the candidates that compile by the compiler's
static cycles (if the kernel has them), bytes moved and FLOPs. Such an entry's `rung` is "static"; a measured entry
replaces it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import hardware, tiles
from pallas_kernels.analysis.timing_loop import chained, start
from pallas_kernels.hardware import Chip
from pallas_kernels.implementation import name_of
from pallas_kernels.tiles import bucket


@dataclass(frozen=True)
class Candidate:
    """One Config and its score in seconds, smaller is better; None if it does not compile or run."""

    config: Any
    score: float | None
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def measure(fn: Callable[..., Any], arrays: Sequence[jax.Array], loops: int = 64, repeats: int = 5) -> float:
    """Median seconds of one call of `fn(*arrays)` on this process' device.

    `loops` calls run inside one program (`timing_loop`). Each depends on the result of the one before, through a
    barrier: nothing is hoisted, overlapped or left out, and there is one launch.
    """
    turn = chained(first := lambda *a: jax.tree.leaves(fn(*a))[0])

    @jax.jit
    def many(x, *held):
        return jax.lax.fori_loop(0, loops, lambda _, state: turn(state, held), start(first, x, *held))

    jax.block_until_ready(many(*arrays))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(many(*arrays))
        seconds.append((time.perf_counter() - started) / loops)
    return statistics.median(seconds)


def values(problem: Any, seed: int = 0) -> list[jax.Array]:
    """The arrays of a problem: its scalars, and random values for the rest."""
    rng = np.random.default_rng(seed)
    found = []
    for x in problem.arguments():
        if isinstance(x, jax.ShapeDtypeStruct):
            most = {"int8": 127, "int4": 7}.get(str(x.dtype))
            drawn = rng.integers(-most, most + 1, x.shape) if most else rng.standard_normal(x.shape, np.float32)
            x = jnp.asarray(drawn, x.dtype)
        found.append(jnp.asarray(x))
    return found


def candidates(problem: Any, chip: Chip) -> list[Any]:
    """The heuristic's Config, then the implementation's `candidates`, else the neighbours of the heuristic's."""
    module = problem.module
    first = module.heuristic(problem.call, chip)
    proposed = module.candidates(problem.call, chip) if hasattr(module, "candidates") else neighbours(first)
    return [c for c in dict.fromkeys([first, *proposed]) if tiles.misfit(module, problem.call, c) is None]


def neighbours(config: Any) -> list[Any]:
    """Configs with one number halved or doubled, as far as the Config accepts it."""
    found = []
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, int) and not isinstance(value, bool):
            for other in (value // 2, value * 2):
                try:
                    found += [replace(config, **{f.name: other})] if other else []
                except ValueError:
                    continue
    return found


def tune(problem: Any, target: str | None = None) -> tuple[str, list[Candidate]]:
    """Score the candidates of a problem.

    Args:
      target: a name of `targets`. None, or this process' chip: measure here.

    Returns:
      The rung, `measured` or `static`, and the candidates, best first, failed ones last.

    Raises:
      ValueError: no target, and this process has no chip of the table.
    """
    here = hardware.detect()
    if target is None and here is None:
        raise ValueError("this process has no chip of the table to measure on: name a target to rank for")
    chip = here if target is None else hardware.chip(target.partition(":")[0])
    if here is not None and chip == here:
        rung, judge = "measured", _measured(problem)
    else:
        rung, judge = "static", _static(problem, target)
    judged = [judge(config) for config in candidates(problem, chip)]
    return rung, sorted(judged, key=lambda c: (c.score is None, c.score or 0.0))


def _measured(problem: Any) -> Callable[[Any], Candidate]:
    arrays = values(problem)

    def judge(config):
        try:
            seconds = measure(problem.fn(config), arrays)
        except Exception as error:  # too much VMEM, or tiles that do not fit: the candidate fails
            return Candidate(config, None, error=str(error).splitlines()[0])
        return Candidate(config, seconds, {"seconds": seconds})

    return judge


def _static(problem: Any, target: str) -> Callable[[Any], Candidate]:
    from pallas_kernels.analysis import static

    chip = hardware.chip(target.partition(":")[0])

    def judge(config):
        try:
            row = static.row(problem, target, config)
        except ValueError:  # no such target: not the candidate's fault
            raise
        except Exception as error:
            row = {"error": str(error)}
        if "error" in row:
            return Candidate(config, None, error=row["error"].splitlines()[0])
        figures = {k: row.get(k) for k in ("bytes", "flops", "cycles", "vmem_bytes", "dynamic")}
        # Dots of masked tiles cost as much as others. Of several cores, each does its share of the cycles.
        score = max(row["moved_seconds"], row["flops"] / (chip.tflops(problem.multiplied) * 1e12))
        if row.get("cycles") and not row["dynamic"]:
            score = max(score, row["cycles"] / (chip.clock_ghz * 1e9))
        if any(k["spill_bytes"] for k in row["kernels"]):
            return Candidate(config, None, figures, "spills registers")
        return Candidate(config, score, figures)

    return judge


def write(op: str, call: Any, chip: Chip, rung: str, best: Candidate, folder: Path | None = None) -> Path:
    """Write the best candidate of a call's bucket to the table. A static one does not replace a measured one."""
    path = tiles.path_of(chip, folder)
    table = tiles.read(path) or {"device": chip.name, "ops": {}}
    entries = table["ops"].setdefault(op, {})
    before = entries.get(bucket(call))
    if not (rung == "static" and before and before.get("rung") == "measured"):
        entries[bucket(call)] = {
            "config": asdict(best.config),
            "rung": rung,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "figures": best.figures | {"score_seconds": best.score},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tiles.forget()
    return path


def main(argv: list[str] | None = None) -> None:
    from pallas_kernels.analysis import targets

    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.analysis.tuning", description=__doc__.split("\n")[0]
    )
    parser.add_argument("op")
    parser.add_argument("--target", help="rank for this chip; without it, measure on this process' device")
    parser.add_argument("--case", help="only cases whose name holds this; else all of real size")
    parser.add_argument("--with", dest="own", help="another implementation of the op: its name, or package.module:name")
    parser.add_argument("--write", action="store_true", help="keep the best, in --folder")
    parser.add_argument("--folder", type=Path, help=f"of the tables; else ${tiles.ENVIRONMENT}, else the package's")
    args = parser.parse_args(argv)
    try:
        run(args.op, args.target, args.case, args.write, args.folder, own=args.own)
    except (ValueError, targets.CompilerMissing) as error:
        raise SystemExit(str(error)) from error


def run(
    op: str,
    target: str | None = None,
    case: str | None = None,
    keep: bool = False,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
    own: str | None = None,
) -> list[dict[str, Any]]:
    """Tune an op's cases; pass each result to `say`, best first, and return all.

    Args:
      target: the chip to rank for; None: measure on this process' device.
      case: only cases whose name contains this; None: all of real size.
      keep: write the best into the table in `folder`.
      own: the name of an implementation, or `package.module:name` of a user's; None: the platform's first.

    Raises:
      ValueError: no such op, chip or case; neither a chip here nor a target; or no candidate of a case works.
      targets.CompilerMissing: ranking needs a compiler that is not installed.
    """
    from pallas_kernels.analysis import problems, targets

    there = problems.cases(op, large_only=case is None)
    here = hardware.detect()
    if target is None and here is None:
        raise ValueError("no chip to measure on here: --target NAME ranks for one by static figures")
    chip = hardware.chip((target or here.name).partition(":")[0])
    found = problems.problems(op, problems.named(op, chip.platform, own), case, large_only=case is None)
    if found and not hasattr(found[0].module, "heuristic"):
        raise ValueError(f"{op}: {name_of(found[0].module)} has no tiles to tune: it declares no `heuristic`")
    chosen = [p for p in found if not p.unsupported]
    if not chosen:
        raise ValueError(
            f"no case of {op} for {chip.name} has {case!r} in its name; "
            f"there are {', '.join(repr(c.name) for c in there)}"
        )
    if chip != here and (why := targets.missing(target)):
        raise targets.CompilerMissing(why)
    failed, results = [], []
    for problem in chosen:
        rung, judged = tune(problem, target)
        told = "measured here" if rung == "measured" else "ranked by static figures: nothing was measured"
        say(f"{op}, {problem.name}, {chip.name}: {told}")
        results.append(
            {
                "case": problem.name,
                "chip": chip.name,
                "rung": rung,
                "candidates": [{"config": asdict(c.config), "score_s": c.score, "error": c.error} for c in judged],
            }
        )
        for c in judged:
            told = f"{c.score * 1e6:10.1f} us" if c.score is not None else c.error[:80]
            say(f"  {told}  {c.config}")
        if keep and judged[0].score is not None:
            results[-1]["file"] = str(
                write(tiles.entry_of(op, problem.module), problem.call, chip, rung, judged[0], folder)
            )
            say(f"  kept in {results[-1]['file']}")
        if judged[0].score is None:
            failed.append(f"{problem.name} ({judged[0].error})")
    if failed:
        raise ValueError(f"{op} on {target or chip.name}: no candidate works for {', '.join(failed)}")
    return results


if __name__ == "__main__":
    main()
