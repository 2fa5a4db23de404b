"""`pdx bench model`, `pdx bench memory` and `pdx eval`."""

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
    ModelOption,
    QuantizeOption,
    bench_app,
    check_names,
    eval_app,
    load_model,
    print_table,
)
from pdx.errors import RequestError
from pdx.io import strict_json
from pdx.weights.builtin import DEFAULT_MODEL


@bench_app.command("model")
def bench_model(
    model: ModelOption = DEFAULT_MODEL,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Prefill length; more than one may be given.", min=1)
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Decode batch size; more than one may be given.", min=1)
    ] = None,
    peer: Annotated[bool, typer.Option(help="Also run transformers on the same weights, if it is installed.")] = True,
    quantize: Annotated[
        list[str] | None, typer.Option(help="Also run the model quantized like this; more than one may be given.")
    ] = None,
    dtype: DtypeOption = "auto",
    kernels: KernelsOption = "auto",
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Measure prefill and decode of a model; compare with quantized weights, transformers, llama.cpp and this machine's
    memory bandwidth."""
    from pdx.bench import model as bench

    check_names(kernels, "auto", *(quantize or ()))
    loaded = load_model(model, dtype, None)
    others = {policy: load_model(model, dtype, None, policy) for policy in quantize or ()}
    result = bench.run(loaded, prompt_tokens or (128, 1024), batch or (1, 8), peer=peer, kernels=kernels, others=others)
    if as_json:
        print(strict_json.dumps(result.to_dict(), indent=2))
        return
    print(result.heading())
    print_table(result.table(), as_markdown)
    print("\n".join(["", *result.notes]))


@bench_app.command("memory")
def bench_memory(
    model: ModelOption = DEFAULT_MODEL,
    quantize: Annotated[
        list[str] | None, typer.Option(help="Quantization, or `none`; more than one may be given.")
    ] = None,
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Measure how much host memory a model needs: the peak while loading, and after it has run."""
    from pdx.bench import memory
    from pdx.weights.progress import slow_notice
    from pdx.weights.resolve import resolve

    check_names("auto", "auto", *(quantize or ()))
    resolve(model)
    with slow_notice("loading and running the model in a process for each quantization"):
        found = memory.measure(model, quantize or ("none", "int8"))
    if as_json:
        print(strict_json.dumps({"model": model, "results": [x.to_dict() for x in found]}))
    else:
        print_table(memory.table(found), as_markdown)


@bench_app.command("speculation")
def bench_speculation(
    model: ModelOption = DEFAULT_MODEL,
    speculate: Annotated[
        str, typer.Option(help="ngram, draft[:MODEL], eagle[:PATH], self:LAYERS or synthetic:ACCEPTANCE.")
    ] = "ngram",
    draft_length: DraftLengthOption = "auto",
    batch: Annotated[
        list[int] | None, typer.Option(help="Prompts that run together; may be given again.", min=1)
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="Kinds of prompts: copy, code, prose, chat, other scripts; all if none.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=2)] = 128,
    repeats: Annotated[int, typer.Option(help="How often each prompt is answered both ways.", min=1)] = 1,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
    as_markdown: MarkdownOption = False,
) -> None:
    """Speculative decoding beside plain decoding, by kind of prompt: speed, acceptance, whether answers are equal."""
    from pdx.bench import device, speculation
    from pdx.speculative.options import asked
    from pdx.weights.progress import progress_bar

    if (chosen := asked(speculate, draft_length)) is None:
        raise RequestError("--speculate none: there is nothing to measure")
    if wrong := [kind for kind in prompts or () if kind not in speculation.PROMPTS]:
        raise RequestError(f"--prompts {wrong[0]!r} is not one of {', '.join(speculation.PROMPTS)}")
    check_names("auto", "auto", quantize)
    loaded = load_model(model, dtype, None, quantize)
    with progress_bar(unit="rows") as bar:
        found = speculation.run(
            loaded,
            chosen,
            batch or (1,),
            kinds=prompts or tuple(speculation.PROMPTS),
            tokens=max_tokens,
            repeats=repeats,
            progress=bar,
        )
    if as_json:
        print(
            strict_json.dumps({"model": loaded.name, "device": device.machine(), "rows": [r.to_dict() for r in found]})
        )
        return
    print_table(speculation.table(found), as_markdown)


@eval_app.command("ppl")
def eval_ppl(
    model: Annotated[str, typer.Argument(help="A model, as for --model.")] = DEFAULT_MODEL,
    file: Annotated[Path | None, typer.Option(help="Text to score; default: Python's language reference.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="For a quantized checkpoint: the original model that it is compared with.")
    ] = None,
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = "auto",
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    stride: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to score; 0: all.", min=0)] = 4096,
    dtype: DtypeOption = "auto",
    kernels: KernelsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity over a text, and KL divergence and top-1 agreement with the unquantized model."""
    import dataclasses

    from pdx.bench import quality
    from pdx.calibration import stdlib_texts
    from pdx.io import inputs
    from pdx.quant import quantize_params
    from pdx.weights.progress import slow_notice

    text = inputs.read(file, stdlib_texts.evaluation)
    check_names(kernels, kv_dtype, quantize)
    plain = load_model(reference or model, dtype, None)
    if reference is not None:
        loaded = load_model(model, dtype, None, quantize)
    else:
        loaded = dataclasses.replace(plain, params=quantize_params(plain.params, quantize)) if quantize else plain
    with slow_notice("scoring the text, window by window"):
        found = quality.evaluate(
            loaded, plain, text, kv_dtype=kv_dtype, length=window, stride=stride, max_tokens=max_tokens, kernels=kernels
        )
    if as_json:
        print(strict_json.dumps(found.to_dict()))
        return
    print(
        f"perplexity      {found.perplexity:.4f} ({found.perplexity / found.reference_perplexity - 1:+.3%} against "
        f"{found.reference_perplexity:.4f} unquantized)\nKL divergence   {found.kl:.6f} nats per token\n"
        f"top-1 agreement {found.top1_agreement:.2%}\ntokens          {found.tokens}"
    )
