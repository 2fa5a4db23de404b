"""The command `pdx`: its entry point, and the options and helpers that several commands share."""

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
    """The commands of `pdx`. All but `doctor` check first that the installed releases of jax's parts fit together."""

    def resolve_command(self, context, arguments):
        name, command, rest = super().resolve_command(context, arguments)
        if name != "doctor" and "--help" not in rest:
            from pdx.installation.versions import check

            check()
        return name, command, rest


app = typer.Typer(
    cls=Commands,
    help="LLM inference in JAX, with prefill and decode as separate phases.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="--debug, anywhere, or PDX_DEBUG=1 shows the traceback of an error.",
)
bench_app = typer.Typer(help="Measure speed and memory on this device.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
eval_app = typer.Typer(help="Measure a model's quality.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Built-in name, .gguf file, Hugging Face directory, hub id, or a checkpoint of `pdx convert`.",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Type of the parameters: auto, f32 or bf16.")]
KvDtypeOption = Annotated[str, typer.Option(help="Type of the KV cache: auto (as the parameters), f32, bf16 or int8.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Quantization of the weights: int8, w8a8, int4[:g64], stored (as in the file), a list with exceptions "
        "such as int4,lm_head=w8a8, or a TOML file.",
    ),
]
KernelsOption = Annotated[str, typer.Option(help="Attention: auto, xla or pallas. A named one never falls back.")]
SpeculateOption = Annotated[
    str | None,
    typer.Option(help="Draft tokens, verify them together: none, ngram, draft[:MODEL], eagle[:PATH], self:LAYERS."),
]
DraftLengthOption = Annotated[
    str,
    typer.Option(
        help="The most drafted tokens of a step; auto: as many as pay, by step. Or a token tree, such as 3x2x1."
    ),
]
MeshOption = Annotated[str | None, typer.Option(help="Mesh of devices, such as data=2,model=4.")]
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
    """LLM inference in JAX, with prefill and decode as separate phases."""


def versions() -> dict[str, str]:
    """The versions of pdx, JAX and Python, read without importing JAX."""
    from importlib.metadata import PackageNotFoundError, version

    from pdx import __version__

    try:
        jax = version("jax")
    except PackageNotFoundError:
        jax = "not installed"
    return {"pdx": __version__, "jax": jax, "python": platform.python_version()}


def refuse_without_effect(context: typer.Context, why: str, *names: str) -> None:
    """Raise RequestError if one of the parameters `names` was given although it has no effect; `why` is the reason."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = next(x.opts[0] for x in context.command.params if x.name == name)
            raise RequestError(f"{option} would change nothing: {why}")


def print_table(table, as_markdown: bool) -> None:
    """Print a `pdx.io.tables.Table` for the screen, or as Markdown."""
    if as_markdown:
        print(table.markdown())
    else:
        table.show()


def load_model(model: str, dtype: str, mesh: str | None, quantize: str | None = None):
    """`pdx.load`, with the compilation cache on and the model's notes on standard error."""
    from pdx.installation.compilation_cache import enable_cache
    from pdx.weights.load import load
    from pdx.weights.progress import slow_notice

    enable_cache()
    with slow_notice(f"loading {model}"):
        loaded = load(model, dtype=dtype, mesh=mesh, quantize=quantize)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def check_names(kernels: str = "auto", kv_dtype: str = "auto", *quantize: str | None) -> None:
    """Check these choices before a model is loaded. Raises RequestError or NotImplementedError."""
    from pdx.generation.generator import cache_dtype
    from pdx.layers.kernels import explain
    from pdx.quant import Policy

    explain(kernels)
    if kv_dtype != "auto":
        cache_dtype(kv_dtype, None)
    for policy in quantize:
        Policy.parse(policy)


def main() -> None:
    """Entry point. An error becomes one line and an exit code, see `pdx.cli.errors`."""
    warnings.showwarning = lambda message, *place, **more: print(f"note: {message}", file=sys.stderr)
    command = typer.main.get_command(app)

    def invoke(arguments: list[str]) -> None:
        # Not `command(arguments)`, because typer would handle interrupts and broken pipes itself.
        with command.make_context("pdx", arguments) as context:
            command.invoke(context)

    sys.exit(errors.run(invoke, sys.argv[1:]))
