"""Static figures of an op's kernels, without their chip.

    python -m pallas_kernels.analysis.static decode_attention --target v5e [--case NAME] [--small] [--json]
        [--config A=1,B=2] [--with NAME or package.module:name]

For each case:
- bytes moved, counted from grid, index maps and DMAs, over the bytes needed: the rows' own K, V, Q and O;
- bytes moved over the bytes stored: on a TPU with K*H rounded up to whole lanes and padding of packed queries written;
- the CostEstimate's bytes over the count, for full rows; FLOPs done over needed; the roofline time of what is needed;
- from the compiler VMEM, or on a GPU shared memory, registers and spills;
- on a GPU the SASS instructions of a turn of the innermost loop, and those per byte that it loads (both of a thread);
- on a TPU the bundles that the kernels issue, of which at most one is issued a cycle, and those over the floor: the
  cycles of the memory or of the matrix units for what is needed, whichever are more. Above 1, the kernel's own
  instructions bound it;
- for kernels without dynamic loops the compiler's static cycles, and over them the cycles at the published peak and
  those that the matrix units need, of which narrow heads leave a part idle.
`--peer` adds JAX's own prefill kernel. These are static figures, not times.

    python -m pallas_kernels.analysis.static decode_attention --summary [--target v5e]

One line per target: the worst and the median of bytes moved over bytes needed, and over bytes stored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.analysis import hlo, jax_kernels, problems, schedule, targets, traffic
from pallas_kernels.analysis.problem import Problem
from pallas_kernels.analysis.static_rows import HEADER, line, ratios
from pallas_kernels.analysis.targets import Target

_MARK = "STATIC "


def facts(problem: Problem, target: Target, config: Any = None, compile: bool = True) -> dict[str, Any]:
    """One row of the table, in a process that was started with `targets.environment()`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler rejects the program.
      UnknownControl: control flow depends on values that the case does not give.
    """
    chip, problem = target.chip, problem.as_projected()
    with target.tracing():
        counted = traffic.count(problem.fn(config), *problem.arguments(), platform=chip.platform)
        full = traffic.count(problem.fn(config), *problem.arguments(full=True), platform=chip.platform)
    dtype = problem.multiplied
    row = {
        "op": problem.op,
        "case": problem.name,
        "target": target.name,
        "bytes": counted.bytes,
        "bytes_needed": problem.bytes_needed,
        "bytes_stored": problem.bytes_stored or problem.bytes_needed,
        "bytes_full": full.bytes,
        "bytes_declared": full.declared_bytes,
        "flops": counted.flops,
        "flops_needed": problem.flops_needed,
        "roofline_seconds": chip.seconds(problem.flops_needed, problem.bytes_needed, dtype),
        "moved_seconds": counted.bytes / (chip.hbm_gbps * 1e9),
        "compute_bound": problem.flops_needed / (chip.tflops(dtype) * 1e3) > problem.bytes_needed / chip.hbm_gbps,
        "floor_cycles": chip.floor_cycles(problem.flops_needed, dtype),
        "memory_cycles": schedule.memory_cycles(chip, problem.bytes_needed) if chip.platform == "tpu" else None,
        "mxu_cycles": chip.floor_cycles(problem.flops_needed, dtype) / problem.mxu_share(chip.mxu),
        "dynamic": any(c.dynamic for c in counted.calls),
        "ieee": all("HIGHEST" in p for c in counted.calls for p in c.precisions),
    }
    return row | (_compiled(problem, target, config, counted.calls) if compile else {})


def _compiled(problem: Problem, target: Target, config: Any, calls: Sequence[traffic.Call] = ()) -> dict[str, Any]:
    c = target.compile(problem.fn(config), *problem.arguments(), donate_argnums=problem.donate_argnums)
    cycles = hlo.estimated_cycles(c.text)
    kernels = schedule.issued(calls, c, target.chip) if c.schedules else []
    known = [max(k.bundles) for k in kernels if k.bundles]
    return {
        "bundles": sum(known) if known and len(known) == len(kernels) else None,
        "issued": [asdict(k) for k in kernels],
        "seconds": c.seconds,
        "vmem_bytes": c.vmem_bytes,
        "cycles": sum(cycles.values()) if cycles else None,
        "temp": c.memory["temp"],
        "pallas_calls": len(hlo.pallas_calls(c.text)),
        "cache": problem.cache_bytes,
        "moved": [str(i) for i in hlo.moved(c.text, max(1 << 24, problem.cache_bytes // 8))],
        "kernels": [k.figures() for k in c.kernels],
    }


def cycles(
    problem: Problem,
    target: Target,
    config: str | None = None,
    timeout: float = 300,
    peer: tuple[int, ...] | None = None,
) -> int | None:
    """The compiler's static cycles of a problem's kernels, from a process of its own, which the compiler can end.

    Args:
      peer: tiles of JAX's own kernel; its cycles are returned instead.

    Returns:
      None if the compiler gives none (GPUs, v4, some DMAs) or takes too long.
    """
    if target.chip.platform != "tpu" or (given := problem.reference) is None:
        return None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            sys.executable,
            "-m",
            "pallas_kernels.analysis.static",
            problem.op,
            "--target",
            target.name,
            "--exact",
            problem.name,
            "--child",
            ",".join(map(str, peer)) if peer else "cycles",
            "--with",
            given,
        ]
        command += ["--config", config] if config else []
        command += ["--layout", layout] if (layout := getattr(problem.call, "layout", None)) else []
        try:
            done = subprocess.run(
                command, env=_environment(profile=profile), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    rows = list(_rows(done.stdout))
    return rows[0].get("cycles") if rows else None


def row(problem: Problem, target: str, config: Any = None) -> dict[str, Any]:
    """The row of one problem, compiled in subprocesses; it has `error` if that failed.

    Raises:
      ValueError, CompilerMissing, RuntimeError: see `table`.
    """
    with Target.get(target).tracing():
        if why := problem.unsupported:
            return {"error": why}
    text = _config_text(config) if config is not None else None
    if problem.reference is None:
        return {"error": "made in this process: a compiler's own process cannot import it"}
    rows = table(problem.op, target, problem.name, True, text, exact=True, own=problem.reference)
    return rows[0] if rows else {"error": "no figures came back"}


def table(
    op: str,
    target: str,
    case: str | None = None,
    small: bool = False,
    config: str | None = None,
    exact: bool = False,
    peer: bool = False,
    timeout: float = 3000,
    own: str | None = None,
) -> list[dict[str, Any]]:
    """The rows for an op on a target, compiled in subprocesses; a row that failed has `error`.

    Args:
      own: the name of an implementation, or `package.module:name` of a user's; None: the platform's first.

    Raises:
      ValueError: no such op, target or case, or no kernel that takes it; the message lists what there is.
      CompilerMissing: the target's compiler is not installed.
      RuntimeError: the compiler ended the process.
    """
    known = Target.get(target)
    by_name = {p.name: p for p in taken(op, known, case, small, exact, own)}
    if (why := targets.missing(target)) is not None:
        raise targets.CompilerMissing(why)
    command = [sys.executable, "-m", "pallas_kernels.analysis.static", op, "--target", target, "--child", "facts"]
    command += ["--exact" if exact else "--case", case] if case else []
    command += ["--config", config] if config else []
    command += ["--small"] if small else []
    command += ["--with", own] if own else []
    with tempfile.TemporaryDirectory() as dump:
        done = subprocess.run(
            command, env=_environment(dump=dump), capture_output=True, text=True, timeout=timeout, check=False
        )
    rows = list(_rows(done.stdout))
    if done.returncode:
        raise RuntimeError(f"the compiler for {target} ended after {len(rows)} cases: {done.stderr[-2000:]}")
    for found in rows:
        if "error" not in found and not found["dynamic"]:
            problem = by_name[found["case"]]
            found["cycles"] = cycles(problem, known, config)
            if peer:
                found["peer"] = {str(t): cycles(problem, known, peer=t) for t in jax_kernels.JAX_FLASH_TILES}
    return rows


def taken(
    op: str, target: Target, case: str | None = None, small: bool = False, exact: bool = False, own: str | None = None
) -> list[Problem]:
    """The problems of an op that its kernel for the target, or `own` (see `table`), supports.

    Args:
      case: only cases whose name contains it; with `exact`, the case of this name.
      small: the small cases too, not only those of real size.

    Raises:
      ValueError: no such op or case, or no kernel for them; the message lists what there is.
    """
    platform = target.chip.platform
    if op not in problems.ops():
        raise ValueError(f"no op {op!r}; there are {', '.join(problems.ops())}")
    if own is None and op not in problems.ops(platform):
        raise ValueError(f"{op} has no kernel for a {platform}; those that have: {', '.join(problems.ops(platform))}")
    named = problems.problems(op, problems.named(op, platform, own), case, large_only=not small)
    named = [p for p in named if not exact or p.name == case]
    if not named:
        there = ", ".join(repr(c.name) for c in problems.cases(op, large_only=not small))
        more = "" if small else "; small ones with --small"
        raise ValueError(f"no case of {op} has {case!r} in its name; there are {there}{more}")
    with target.tracing():
        refused = {p.name: p.unsupported for p in named}
    found = [p for p in named if refused[p.name] is None]
    if not found:
        raise ValueError(f"the kernel of {op} takes none of these cases on {target.name}: {refused[named[0].name]}")
    return found


def _environment(**folders: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), *sys.path)))
    return os.environ | targets.environment(**folders) | {"XLA_FLAGS": "", "PYTHONPATH": paths}


def _rows(stdout: str) -> Iterator[dict[str, Any]]:
    for said in stdout.splitlines():
        if said.startswith(_MARK):
            yield json.loads(said.removeprefix(_MARK))


def _config_text(config: Any) -> str:
    values = asdict(config) if is_dataclass(config) else config
    return ",".join(f"{k}={v}" for k, v in values.items())


def _parse_config(problem: Problem, text: str | None) -> Any:
    """A Config from `a=1,b=2`; fields that are not named are the heuristic's. Values are Python literals."""
    if not text:
        return None
    import ast
    from dataclasses import replace

    values = dict(part.split("=", 1) for part in text.split(","))
    found = problem.module.heuristic(problem.call, None)
    return replace(found, **{k: ast.literal_eval(v) for k, v in values.items()})


def _child(args: argparse.Namespace) -> None:
    target = Target.get(args.target)
    for problem in _chosen(args, target):
        row = {"op": problem.op, "case": problem.name, "target": target.name}
        try:
            config = _parse_config(problem, args.config)
            with target.tracing():
                refused = problem.unsupported
            if refused:
                continue
            if args.child == "facts":
                row |= facts(problem, target, config)
            elif args.child == "cycles":
                row |= _compiled(problem, target, config)
            else:
                fn, arguments = jax_kernels.jax_flash(problem, tuple(map(int, args.child.split(","))))
                row["cycles"] = sum(hlo.estimated_cycles(target.compile(fn, *arguments).text).values()) or None
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        print(_MARK + json.dumps(row), flush=True)


def _chosen(args: argparse.Namespace, target: Target) -> list[Problem]:
    given = problems.named(args.op, target.chip.platform, args.own)
    found = problems.problems(args.op, given, args.exact or args.case, not (args.small or args.exact), args.layout)
    return [p for p in found if args.exact is None or p.name == args.exact][: 1 if args.exact else None]


def summary(op: str, target: str) -> str:
    """A line of a Markdown table: the worst and the median case of an op on a target, counted without a compiler."""
    known = Target.get(target)
    rows = [facts(p, known, compile=False) for p in taken(op, known)]
    over = [ratios(r) for r in rows]
    cells = [f"{max(x[k] for x in over):.3f}, {statistics.median(x[k] for x in over):.3f}" for k in ("moved", "stored")]
    declared = max((x["declared"] for x in over), key=lambda x: abs(x - 1))
    times = sorted(r["roofline_seconds"] * 1e6 for r in rows)
    return (
        f"| {op} | {target} | {len(rows)} | {' | '.join(cells)} | {declared:.3f} | "
        f"{times[-1]:.1f}, {statistics.median(times):.1f} |"
    )


SUMMARY = (
    "| op | target | cases | moved / needed: worst, median | moved / stored: worst, median | declared / count | "
    "roofline us: longest, median |\n|---|---|---|---|---|---|---|"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.analysis.static", description=__doc__.split("\n")[0]
    )
    parser.add_argument("op", help=f"one of {', '.join(problems.ops())}")
    parser.add_argument("--target", help=f"{', '.join(targets.NAMES)}; slices such as v5e:2x4")
    parser.add_argument("--case", help="only cases whose name holds this")
    parser.add_argument("--small", action="store_true", help="the small cases too")
    parser.add_argument("--config", help="tiles instead of the heuristic's, such as key_block=512,splits=2")
    parser.add_argument("--with", dest="own", help="another implementation of the op: its name, or package.module:name")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--exact", help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)  # facts, cycles, or the peer's tiles
    parser.add_argument("--peer", action="store_true", help="JAX's own prefill kernel beside cases without a mask")
    parser.add_argument(
        "--summary",
        action="store_true",
        help="a line of bytes and roofline a target, all of them without --target; needs no compiler",
    )
    args = parser.parse_args(argv)
    if args.target is None and not args.summary:
        parser.error("--target is needed without --summary")
    if args.child:
        return _child(args)
    if args.peer and args.op != "flash_attention":
        raise SystemExit(f"--peer: JAX ships no kernel that is put beside {args.op}, only beside flash_attention")
    try:
        return _summaries(args) if args.summary else _table(args)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        raise SystemExit(str(error)) from error


def _summaries(args: argparse.Namespace) -> None:
    names = [args.target] if args.target else targets.NAMES
    # If no target has the op, the error of the first says why.
    chosen = [t for t in names if args.op in problems.ops(Target.get(t).chip.platform)] or names[:1]
    print("\n".join([SUMMARY, summary(args.op, chosen[0])]), flush=True)
    for name in chosen[1:]:
        print(summary(args.op, name), flush=True)


def _table(args: argparse.Namespace) -> None:
    rows = table(args.op, args.target, args.case, args.small, args.config, peer=args.peer, own=args.own)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{args.op} on {args.target}: static figures, nothing here was measured; roofline in us\n{HEADER}")
        print("\n".join(line(row) for row in rows))
    if all("error" in row for row in rows):
        raise RuntimeError(
            f"no case of {args.op} has figures for {args.target}: "
            f"{rows[0]['error'].splitlines()[0] if rows else 'none came back'}"
        )


if __name__ == "__main__":
    main()
