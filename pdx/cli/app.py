"""The command itself, the options that several commands share, and the entry point."""

from __future__ import annotations

import platform
import sys
import warnings
from typing import Annotated

import typer
from typer.core import TyperGroup

from pdx.cli import errors
from pdx.errors import RequestError


class Commands(TyperGroup):
    """The commands of `pdx`. None starts with a jax whose parts do not fit, but `doctor`, which says what is wrong."""

    def resolve_command(self, context, arguments):
        name, command, rest = super().resolve_command(context, arguments)
        if name != "doctor" and "--help" not in rest:
            from pdx.installation.versions import check

            check()
        return name, command, rest


app = typer.Typer(
    cls=Commands,
    help="LLM inference in JAX, prefill and decode apart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="--debug, anywhere, or PDX_DEBUG=1 shows the traceback of an error.",
)
bench_app = typer.Typer(help="Measure, on this device.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
eval_app = typer.Typer(help="Measure quality.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Built-in name, .gguf file, Hugging Face directory, hub id, or a checkpoint of `pdx convert`.",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Parameters: auto, f32 or bf16.")]
KvDtypeOption = Annotated[str, typer.Option(help="KV-cache: auto (as the parameters), f32, bf16 or int8.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Weights: int8, w8a8, int4[:g64], stored (as in "
        "the file), exceptions such as int4,lm_head=w8a8, or a TOML file.",
    ),
]
KernelsOption = Annotated[str, typer.Option(help="Attention: auto, xla or pallas. A named one never falls back.")]
MeshOption = Annotated[str | None, typer.Option(help="Devices, such as data=2,model=4.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown, however wide.")]


def _version(asked: bool) -> None:
    if asked:
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def pdx(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the versions of pdx, JAX and Python."),
    ] = False,
) -> None:
    """LLM inference in JAX, prefill and decode apart."""


def versions() -> dict[str, str]:
    """Of pdx, JAX and Python, read without importing JAX."""
    from importlib.metadata import PackageNotFoundError, version

    from pdx import __version__

    try:
        jax = version("jax")
    except PackageNotFoundError:
        jax = "not installed"
    return {"pdx": __version__, "jax": jax, "python": platform.python_version()}


def refuse_without_effect(context: typer.Context, why: str, *names: str) -> None:
    """Raise RequestError for an option of the command line that would change nothing; `why` says so."""
    for name in names:
        if context.get_parameter_source(name).name == "COMMANDLINE":
            option = next(x.opts[0] for x in context.command.params if x.name == name)
            raise RequestError(f"{option} would change nothing: {why}")


def print_table(table, as_markdown: bool) -> None:
    """A `pdx.io.tables.Table` for the screen, or as Markdown."""
    if as_markdown:
        print(table.markdown())
    else:
        table.show()


def load_model(model: str, dtype: str, mesh: str | None, quantize: str | None = None):
    from pdx.installation.compilation_cache import enable_cache
    from pdx.weights.load import load
    from pdx.weights.progress import still

    enable_cache()
    with still(f"loading {model}"):
        loaded = load(model, dtype=dtype, mesh=mesh, quantize=quantize)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def check_names(kernels: str = "auto", kv_dtype: str = "auto", *quantize: str | None) -> None:
    """Raise, before a model is loaded, what these choices would raise after it."""
    from pdx.generation.generator import cache_dtype
    from pdx.layers.kernels import explain
    from pdx.quant import Policy

    explain(kernels)
    if kv_dtype != "auto":
        cache_dtype(kv_dtype, None)
    for policy in quantize:
        Policy.parse(policy)


def main() -> None:
    """Entry point: whatever goes wrong ends in one line and an exit code, see `pdx.cli.errors`."""
    warnings.showwarning = lambda message, *place, **more: print(f"note: {message}", file=sys.stderr)
    command = typer.main.get_command(app)

    def invoke(arguments: list[str]) -> None:
        # Not called as a whole: typer would end interrupts and broken pipes in its own way.
        with command.make_context("pdx", arguments) as context:
            command.invoke(context)

    sys.exit(errors.run(invoke, sys.argv[1:]))
