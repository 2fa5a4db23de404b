"""`pdx bench load` and `pdx bench engine`: the engine under load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdx.cli.app import (
    DraftLengthOption,
    DtypeOption,
    JsonOption,
    KernelsOption,
    KvDtypeOption,
    MarkdownOption,
    MeshOption,
    ModelOption,
    QuantizeOption,
    SpeculateOption,
    bench_app,
    check_names,
    load_model,
    print_table,
    refuse_without_effect,
)
from pdx.cli.serving import ProfileOption, SlotsOption, TokenBudgetOption, drafts_of, engine_config
from pdx.errors import RequestError
from pdx.io import strict_json
from pdx.weights.builtin import DEFAULT_MODEL

LENGTHS = "128, uniform:LOW:HIGH, normal:MEAN:SD, lognormal:MEDIAN:SIGMA or zipf:LOW:HIGH:EXPONENT"


@bench_app.command("load")
def bench_load(
    context: typer.Context,
    model: ModelOption = DEFAULT_MODEL,
    arrival: Annotated[
        str, typer.Option(help="poisson; burst (in clusters); closed (a client waits for each answer).")
    ] = "poisson",
    rate: Annotated[
        list[float] | None, typer.Option(help="Requests per second; inf: all at once; more than one may be given.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option(help="Clients of a closed load; more than one may be given.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of each load, or the most that a trace is read for.")] = 64,
    prompt_len: Annotated[str, typer.Option(help=f"Tokens of a prompt: {LENGTHS}.")] = "lognormal:128:0.5",
    output_len: Annotated[str, typer.Option(help="Tokens of an answer, in the same notation.")] = "uniform:16:128",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.", min=0)] = 0,
    burstiness: Annotated[
        float, typer.Option(help="For burst: shape of the gamma distribution of the gaps; 1 is poisson.")
    ] = 0.25,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with arrival_s, prompt_tokens and output_tokens, instead of --arrival, --rate and lengths."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text that prompts are cut from; default: Python's language reference.")
    ] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="TTFT objective for goodput, in milliseconds.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="TPOT objective for goodput, in milliseconds.")] = None,
    slo_e2e: Annotated[float | None, typer.Option(help="E2E objective for goodput, in milliseconds.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare values of a setting: chunked_prefill=on,off, "
            "prefix_cache=on,off, slots=1,4,8, kv_dtype=auto,int8, "
            "quantize=none,int8, speculate=none,ngram, ...; if given more than once, all combinations."
        ),
    ] = None,
    profile: ProfileOption = None,
    slots: SlotsOption = None,
    token_budget: TokenBudgetOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths and prompts.", min=0)] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="File for a plot of latency against throughput, such as load.png.")
    ] = None,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    speculate: SpeculateOption = None,
    draft_length: DraftLengthOption = "auto",
    mesh: MeshOption = None,
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Measure the engine under load: TTFT, TPOT, E2E, throughput and goodput, for several rates and settings."""
    from pdx.bench import load
    from pdx.bench.load import page, workload
    from pdx.installation.devices import where_run
    from pdx.metrics import Objectives
    from pdx.sampling.options import SamplingOptions

    if trace is not None:
        refuse_without_effect(context, "the trace has the lengths of prompts and answers", "prompt_len", "output_len")
    if trace is not None or arrival != "burst":
        refuse_without_effect(context, "it is for --arrival burst", "burstiness")
    pressures = _pressures(arrival, rate, clients, trace)
    lengths = workload.Lengths.parse(prompt_len), workload.Lengths.parse(output_len)
    objectives = Objectives(*(None if x is None else x / 1e3 for x in (slo_ttft, slo_tpot, slo_e2e)))
    is_varied = any(x.startswith(("speculate=", "draft_length=")) for x in vary or ())
    drafts = drafts_of(speculate, draft_length, is_varied=is_varied)
    base = engine_config(profile, kv_dtype=kv_dtype, kernels=kernels, slots=slots, token_budget=token_budget, **drafts)
    each = load.variants(base, quantize, vary or ())
    for side in each:
        check_names(side.config.kernels, side.config.kv_dtype, side.quantize)
    if plot:
        page.check_plot(plot)
    sampling = SamplingOptions(temperature=temperature, seed=seed)

    models = {stored: load_model(model, dtype, mesh, stored) for stored in dict.fromkeys(s.quantize for s in each)}
    first = next(iter(models.values()))
    device, loads = where_run(first.mesh), []
    for number, pressure in enumerate(pressures):  # with new prompts, so that the prefix cache holds none of them
        prompts = workload.Prompts.of(first, seed * len(pressures) + number, shared_prefix, text)
        loads.append(
            workload.read_trace(trace, prompts, requests)
            if trace
            else workload.make(arrival, pressure, requests, *lengths, prompts, seed=seed, burstiness=burstiness)
        )
    results = load.compare(models, each, loads, objectives, sampling=sampling)
    if as_json:
        fields = {"model": first.name, "device": device, "results": [r.to_dict() for r in results]}
        print(strict_json.dumps(fields))
    else:
        print(
            f"{first.name}, {first.dtype}, on {device}; {len(loads[0].requests)} requests per load, "
            f"{loads[0].process}\n"
        )
        print_table(page.table(results), as_markdown)
        print("\n".join(["", *page.notes(results)]))
    if plot:
        page.plot(results, plot, f"{first.name}, {loads[0].process}, {len(loads[0].requests)} requests per load")


def _pressures(arrival: str, rate, clients, trace: Path | None) -> list[float]:
    """The rates, or for `closed` the numbers of clients. Raises RequestError for options that exclude each other."""
    if trace is not None:
        if rate or clients or arrival != "poisson":
            raise RequestError("--trace has the arrival times: leave out --arrival, --rate and --clients")
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
        typer.Option(help="throughput, gap, prefix or overhead; more than one may be given. Default: all."),
    ] = None,
    peer: Annotated[bool, typer.Option(help="Also run transformers on the same weights, if it is installed.")] = True,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Measure the engine against its targets: throughput, stalls, prefix reuse and overhead."""
    from pdx.bench import engine_figures as figures

    figures.check_names(only or ())
    check_names("auto", "auto", quantize)
    found, notes = figures.run(load_model(model, dtype, None, quantize), only or (), peer=peer)
    if as_json:
        print(strict_json.dumps({"figures": [f.to_dict() for f in found], "notes": notes}))
    else:
        print_table(figures.table(found), as_markdown)
        print("\n".join(notes), end="\n" if notes else "")
