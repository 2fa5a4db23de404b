"""`pdx bench load` and `pdx bench engine`: the engine under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import (
    DtypeOption,
    JsonOption,
    KernelsOption,
    KvDtypeOption,
    MarkdownOption,
    MeshOption,
    ModelOption,
    QuantizeOption,
    bench_app,
    check_names,
    load_model,
    print_table,
    refuse_without_effect,
)
from pdx.cli.serving import ProfileOption, SlotsOption, TokenBudgetOption, engine_config
from pdx.errors import RequestError
from pdx.io import strict_json
from pdx.weights.builtin import DEFAULT_MODEL

LENGTHS = "128, uniform:LOW:HIGH, normal:MEAN:SD, lognormal:MEDIAN:SIGMA or zipf:LOW:HIGH:EXPONENT"


@bench_app.command("load")
def bench_load(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    arrival: Annotated[
        str, typer.Option(help="poisson; burst (in clusters); closed (each client sends when it has its answer).")
    ] = "poisson",
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests a second, inf: all at once; more than one may be given.")
    ] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Of closed; more than one may be given.")] = None,
    requests: Annotated[int, typer.Option(help="Of each load; of a trace, the first so many.")] = 64,
    prompt_len: Annotated[str, typer.Option(help=f"Tokens of a prompt: {LENGTHS}.")] = "lognormal:128:0.5",
    output_len: Annotated[str, typer.Option(help="Tokens of an answer, likewise.")] = "uniform:16:128",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.", min=0)] = 0,
    burstiness: Annotated[
        float, typer.Option(help="Of burst: the shape of the gaps' gamma distribution; 1 is poisson.")
    ] = 0.25,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of arrival_s, prompt_tokens, output_tokens, instead of --arrival, --rate and the lengths."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="What prompts are cut from; without it, Python's language reference.")
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Milliseconds to the first token, for goodput.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Milliseconds a token, for goodput.")] = None,
    slo_e2e: Annotated[float | None, typer.Option(help="Milliseconds in all, for goodput.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings side by side: chunked_prefill=on,off, "
            "prefix_cache=on,off, slots=1,4,8, kv_dtype=auto,int8, "
            "quantize=none,int8, ...; all combinations of several."
        ),
    ] = None,
    profile: ProfileOption = None,
    slots: SlotsOption = None,
    token_budget: TokenBudgetOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(help="Picture of latency against throughput, such as load.png.")] = None,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    mesh: MeshOption = None,
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """The engine under load: TTFT, TPOT, E2E, throughput and goodput, over rates and settings side by side."""
    from pdx.bench import load
    from pdx.bench.load import page, workload
    from pdx.installation.devices import where_run
    from pdx.metrics import Objectives
    from pdx.sampling.options import SamplingOptions

    if trace is not None:
        refuse_without_effect(context, "the trace says how long prompts and answers are", "prompt_len", "output_len")
    if trace is not None or arrival != "burst":
        refuse_without_effect(context, "it is for --arrival burst", "burstiness")
    pressures = _pressures(arrival, rate, clients, trace)
    lengths = workload.Lengths.parse(prompt_len), workload.Lengths.parse(output_len)
    objectives = Objectives(*(None if x is None else x / 1e3 for x in (slo_ttft, slo_tpot, slo_e2e)))
    base = engine_config(profile, kv_dtype=kv_dtype, kernels=kernels, slots=slots, token_budget=token_budget)
    each = load.variants(base, quantize, vary or ())
    for side in each:
        check_names(side.config.kernels, side.config.kv_dtype, side.quantize)
    if plot:
        page.check_plot(plot)
    sampling = SamplingOptions(temperature=temperature, seed=seed)

    models = {stored: load_model(model, dtype, mesh, stored) for stored in dict.fromkeys(s.quantize for s in each)}
    first = next(iter(models.values()))
    device, loads = where_run(first.mesh), []
    for number, pressure in enumerate(pressures):  # other prompts for each, or the prefix cache would know them
        prompts = workload.Prompts.of(first, seed * len(pressures) + number, shared_prefix, text)
        loads.append(
            workload.read_trace(trace, prompts, requests)
            if trace
            else workload.make(arrival, pressure, requests, *lengths, prompts, seed=seed, burstiness=burstiness)
        )
    results = load.compare(models, each, loads, objectives, sampling=sampling)
    if as_json:
        said = {"model": first.name, "device": device, "results": [r.to_dict() for r in results]}
        print(strict_json.dumps(said))
    else:
        print(
            f"{first.name}, {first.dtype}, on {device}; {len(loads[0].requests)} requests a load, {loads[0].process}\n"
        )
        print_table(page.table(results), as_markdown)
        print("\n".join(["", *page.notes(results)]))
    if plot:
        page.plot(results, plot, f"{first.name}, {loads[0].process}, {len(loads[0].requests)} requests a load")


def _pressures(arrival: str, rate, clients, trace: Path | None) -> list[float]:
    """Rates or numbers of clients, as the arrival wants them. Raises RequestError for what does not go together."""
    if trace is not None:
        if rate or clients or arrival != "poisson":
            raise RequestError("--trace says when requests come: leave out --arrival, --rate and --clients")
        return [0.0]
    closed = arrival == "closed"
    given, other = (clients, rate) if closed else (rate, clients)
    if other:
        raise RequestError("closed takes --clients, not --rate" if closed else f"{arrival} takes --rate, not --clients")
    if not given:
        raise RequestError(
            "closed needs --clients, such as --clients 8"
            if closed
            else "give --rate, such as --rate 1 --rate 2 --rate 4"
        )
    return list(given)


@bench_app.command("engine")
def bench_engine(
    model: ModelOption = DEFAULT_MODEL,
    only: Annotated[
        list[str] | None,
        typer.Option(help="throughput, gap, prefix or overhead; more than one may be given. Without it, all."),
    ] = None,
    peer: Annotated[bool, typer.Option(help="Also run transformers on the same weights, if it is installed.")] = True,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """What the engine is held to: throughput, stalls, prefix reuse and overhead, each as a ratio beside its target."""
    from pdx.bench import engine_figures as figures

    figures.check_names(only or ())
    check_names("auto", "auto", quantize)
    found, notes = figures.run(load_model(model, dtype, None, quantize), only or (), peer=peer)
    if as_json:
        print(strict_json.dumps({"figures": [f.to_dict() for f in found], "notes": notes}))
    else:
        print_table(figures.table(found), as_markdown)
        print("\n".join(notes), end="\n" if notes else "")
