"""The command itself, the options that several commands share, and the entry point."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from pdx.errors import PdxError


class Commands(TyperGroup):
    """The commands of `pdx`. None starts with a jax whose parts do not fit, but `doctor`, which says what is wrong."""

    def resolve_command(self, context, arguments):
        name, command, rest = super().resolve_command(context, arguments)
        if name != "doctor" and "--help" not in rest:
            from pdx.versions import check

            check()
        return name, command, rest


app = typer.Typer(
    cls=Commands, help="LLM inference in JAX, prefill and decode apart.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
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


def main() -> None:
    """Entry point: errors that pdx raises on purpose are printed without a traceback."""
    try:
        app()
    except (PdxError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of standard output went away (`| head`): nobody is left to tell.
        sys.stderr.close()
        sys.exit(0)
