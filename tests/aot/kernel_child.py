"""Compile problems of the ops for one target and print what the compiler made of them, a JSON object a line.

`python -m tests.aot.kernel_child TARGET OP:CASE ...`, in a process started with `targets.environment()`. Before each
problem its name is printed, so that the parent knows which one ended the process.
"""

import json
import sys
from functools import cache

import jax

from pallas_kernels.analysis import hlo, problems, traffic
from pallas_kernels.analysis.problem import Problem, nbytes
from pallas_kernels.analysis.targets import Target


@cache
def known(op: str, platform: str) -> dict[str, Problem]:
    return {p.name: p for p in problems.problems(op, platform)}


def facts(problem: Problem, target: Target) -> dict:
    with target.tracing():
        if why := problem.unsupported:
            return {"unsupported": why}
    problem = problem.as_projected()
    c = target.compile(problem.fn(), *problem.arguments(), donate_argnums=problem.donate_argnums)
    with target.tracing():
        dots = list(traffic.dots(jax.make_jaxpr(problem.fn())(*problem.arguments())))
    wide = [d for d in dots if "float32" in {str(v.aval.dtype) for v in d.invars}]
    text = c.text
    # From the smallest array of the cache on: queries and results are smaller, and may be laid out as a kernel likes.
    smallest = min(nbytes(problem.arrays[n]) for n in problem.cache)
    return {
        "seconds": c.seconds,
        "kernels": text.count('custom_call_target="tpu_custom_call"') + len([k for k in c.kernels if k.shared_bytes]),
        "vmem": c.vmem_bytes,
        "temp": c.memory["temp"],
        "cache": problem.cache_bytes,
        "queries": nbytes(next(iter(problem.arrays.values()))),
        "moved": [str(i) for i in hlo.moved(text, smallest)],
        "dtype": problem.call.dtype,
        "kv_dtype": problem.call.kv_dtype,
        "not_ieee": sum("HIGHEST" not in str(d.params["precision"]) for d in wide),
        "registers": max((k.registers for k in c.kernels), default=0),
        "spills": sum(k.spill_bytes for k in c.kernels),
        "shared": max((k.shared_bytes for k in c.kernels), default=0),
        "mma": sorted({name for k in c.kernels for name in k.mma}),
        "tensor_cores": any(k.tensor_cores for k in c.kernels),
    }


if __name__ == "__main__":
    target = Target.get(sys.argv[1])
    for name in sys.argv[2:]:
        op, case = name.split(":", 1)
        print(json.dumps({"begin": name}), flush=True)
        try:
            found = facts(known(op, target.chip.platform)[case], target)
        except Exception as error:  # each problem is a test of its own: the others go on
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"name": name} | found), flush=True)
