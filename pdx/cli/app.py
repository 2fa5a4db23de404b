"""The command itself, the options that several commands share, and the entry point."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pdx.cli import errors

app = typer.Typer(
    help="LLM inference in JAX, prefill and decode apart.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False, epilog="--debug, anywhere, or PDX_DEBUG=1 shows the traceback of an error.",
)  # fmt: skip
bench_app = typer.Typer(help="Measure, on this device.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
eval_app = typer.Typer(help="Measure quality.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Built-in name, .gguf file, Hugging Face directory, "
                                          "hub id, or a checkpoint of `pdx convert`.")]  # fmt: skip
DtypeOption = Annotated[str, typer.Option(help="Parameters: auto, f32 or bf16.")]
KvDtypeOption = Annotated[str, typer.Option(help="KV-cache: auto (as the parameters), f32, bf16 or int8.")]
QuantizeOption = Annotated[str | None, typer.Option("--quantize", help="Weights: int8, w8a8, int4[:g64], stored (as in "
                                                    "the file), exceptions such as int4,lm_head=w8a8, or a TOML file.")]
KernelsOption = Annotated[str, typer.Option(help="Attention: auto, xla or pallas. A named one never falls back.")]
MeshOption = Annotated[str | None, typer.Option(help="Devices, such as data=2,model=4.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def load_model(model: str, dtype: str, mesh: str | None, quantize: str | None = None):
    from pdx.compilation import enable_cache
    from pdx.weights.load import load

    enable_cache()
    loaded = load(model, dtype=dtype, mesh=mesh, quantize=quantize)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def check_names(kernels: str = "auto", kv_dtype: str = "auto", *quantize: str | None) -> None:
    """Raise, before a model is loaded, what these choices would raise after it."""
    from pdx.generation import cache_dtype
    from pdx.layers.attention import explain
    from pdx.quant import Policy

    explain(kernels)
    if kv_dtype != "auto":
        cache_dtype(kv_dtype, None)
    for policy in quantize:
        Policy.parse(policy)


def main() -> None:
    """Entry point: whatever goes wrong ends in one line and an exit code, see `pdx.cli.errors`."""
    command = typer.main.get_command(app)

    def invoke(arguments: list[str]) -> None:
        # Not called as a whole: typer would end interrupts and broken pipes in its own way.
        with command.make_context("pdx", arguments) as context:
            command.invoke(context)

    sys.exit(errors.run(invoke, sys.argv[1:]))
