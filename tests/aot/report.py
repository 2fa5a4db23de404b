"""Tables of docs/kernel_figures.md from what was found.

`python -m tests.aot.report FILE ...`: a `.jsonl` is what PDX_AOT_REPORT kept of `pytest -m aot`, a `.json` what
`python -m pallas_kernels.analysis.static OP --target NAME --json` printed.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from pallas_kernels.analysis import targets
from pallas_kernels.analysis.static import ratios

MIB, KIB = 2**20, 2**10


def matrix(rows: list[dict]) -> str:
    """One line an op and target and JAX version: how many cases, and the worst of what was read from the compiler."""
    latest = {(r["jax"], r["name"].split(":")[0], r["target"], r["name"]): r for r in rows}
    groups = defaultdict(list)
    for (version, op, target, _), row in latest.items():
        groups[op, targets.NAMES.index(target), version].append(row)
    lines = [
        "| op | target | JAX | compiled | refused by `supported` | failed | memory | registers, spills | "
        "tensor cores (bf16, int8) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (op, target, version), found in sorted(groups.items()):
        done = [r for r in found if "error" not in r and "unsupported" not in r]
        gpu = targets.Target.get(targets.NAMES[target]).chip.platform == "gpu"
        most = max((r["shared" if gpu else "vmem"] for r in done), default=0)
        memory = f"{most / KIB:.0f} KiB shared" if gpu else f"{most / MIB:.1f} MiB VMEM"
        registers = f"{max(r['registers'] for r in done)}, {sum(r['spills'] for r in done)} B" if gpu else ""
        cores = [r["tensor_cores"] for r in done if r["dtype"] == "bfloat16"]
        lines.append(
            f"| {op} | {targets.NAMES[target]} | {version} | {len(done)} | {sum('unsupported' in r for r in found)} | "
            f"{sum('error' in r for r in found)} | up to {memory} | {registers} | "
            f"{f'{sum(cores)} of {len(cores)}' if gpu else ''} |"
        )
    return "\n".join(lines)


def static(rows: list[dict]) -> str:
    """One line a case and target."""
    lines = [
        "| op, case | target | MB moved | / needed | declared / count | FLOPs / needed | roofline us | bound by | "
        "memory | cycles | peak / cycles | MXU / cycles |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["op"], r["case"], targets.NAMES.index(r["target"]))):
        start = f"| {r['op']}, {r['case']} | {r['target']} "
        if "error" in r:
            lines.append(f"{start}| {r['error'].splitlines()[0][:100]} |" + " |" * 9)
            continue
        kernels = r["kernels"]
        memory = f"{r['vmem_bytes'] / MIB:.1f} MiB"
        if kernels:
            shared, registers = (max(k[part] for k in kernels) for part in ("shared_bytes", "registers"))
            memory = f"{shared / KIB:.0f} KiB, {registers} registers"
        over = ratios(r)
        told = f"{r['cycles']:,} | {over['peak']:.2f} | {over['mxu']:.2f}" if "mxu" in over else " | | "
        lines.append(
            f"{start}| {r['bytes'] / 1e6:.1f} | {over['moved']:.3f} | {over['declared']:.3f} | {over['flops']:.2f} | "
            f"{r['roofline_seconds'] * 1e6:.1f} | {'arithmetic' if r['compute_bound'] else 'memory'} | {memory} | "
            f"{told} |"
        )
    return "\n".join(lines)


def main(paths: list[str]) -> None:
    found: dict[str, list[dict]] = {".jsonl": [], ".json": []}
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        lines = path.suffix == ".jsonl"
        found[path.suffix] += [json.loads(x) for x in text.splitlines()] if lines else json.loads(text)
    for rows, show in ((found[".jsonl"], matrix), (found[".json"], static)):
        if rows:
            print(show(rows), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
