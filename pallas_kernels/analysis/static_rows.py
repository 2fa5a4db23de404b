"""What the table of static figures prints of a row: its ratios, and its line."""

from __future__ import annotations

from typing import Any

HEADER = (
    f"{'case':44} {'MB moved':>9} {'/needed':>7} {'/stored':>7} {'decl/cnt':>8} {'GFLOP':>9} {'/need':>6} "
    f"{'roofline':>9} {'bound':8} {'memory':>10} {'bundles':>11} {'/floor':>7} {'cycles':>11} {'peak/':>6} {'MXU/':>6}"
)


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """The ratios of a row that tables print; those of cycles only if there are cycles."""
    found = {
        "moved": row["bytes"] / max(row["bytes_needed"], 1),
        "stored": row["bytes"] / max(row["bytes_stored"], 1),
        "declared": row["bytes_declared"] / max(row["bytes_full"], 1),
        "flops": row["flops"] / max(row["flops_needed"], 1),
    }
    if row.get("bundles"):
        found["bundles"] = row["bundles"] / max(row["memory_cycles"], row["mxu_cycles"])
    if row.get("cycles") and not row["dynamic"]:
        found |= {"peak": row["floor_cycles"] / row["cycles"], "mxu": row["mxu_cycles"] / row["cycles"]}
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the printed table."""
    if "error" in row:
        return f"{row['case'][:44]:44} {row['error'].splitlines()[0][:120]}"
    over = ratios(row)
    text = (
        f"{row['case'][:44]:44} {row['bytes'] / 1e6:9.2f} {over['moved']:7.3f} {over['stored']:7.3f} "
        f"{over['declared']:8.3f} {row['flops'] / 1e9:9.2f} {over['flops']:6.2f} "
        f"{row['roofline_seconds'] * 1e6:9.1f} {'compute' if row['compute_bound'] else 'memory':8}"
    )
    if row["kernels"]:
        most = max(row["kernels"], key=lambda k: k["registers"])
        return text + (
            f" {max(k['shared_bytes'] for k in row['kernels']) / 1024:6.1f} KiB, {most['registers']} regs, "
            f"{sum(k['spill_bytes'] for k in row['kernels'])} B spilled{_issued(most.get('loops', []))}"
        )
    text += f" {row['vmem_bytes'] / 2**20:6.2f} MiB"
    if "bundles" in over:
        text += f" {row['bundles']:>11,} {over['bundles']:7.2f}"
    else:
        text += " " * 20
    if "mxu" in over:
        text += f" {row['cycles']:>11,} {over['peak']:6.2f} {over['mxu']:6.2f}"
    for tiles, count in row.get("peer", {}).items():
        over = ratios(row | {"cycles": count})
        told = f"{count:>11,} {over['peak']:6.2f} {over['mxu']:6.2f}" if count else "none"
        text += f"\n  JAX's own, tiles {tiles:127} {told}"
    return text


def _issued(loops: list[dict[str, Any]]) -> str:
    """The instructions of a GPU kernel's largest innermost loop."""
    if not loops:
        return ""
    largest = max(loops, key=lambda x: x["instructions"])
    told = f", {largest['instructions']} instructions a turn"
    return told if largest["per_byte"] is None else f"{told}, {largest['per_byte']:.2f} a byte"
