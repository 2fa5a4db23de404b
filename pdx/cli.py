"""The command line: arguments in, text out. Everything it does is a call that Python can make too.

jax and the model code are imported by the command that needs them, so that `pdx --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pdx.errors import PdxError, RequestError
from pdx.weights.builtin import DEFAULT_MODEL

app = typer.Typer(
    help="LLM inference in JAX, prefill and decode apart.", no_args_is_help=True, add_completion=False,
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


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads standard input.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divides logits of tokens seen; 1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off once for a token generated before.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Taken off for each time it was generated.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given more than once.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind an end token.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Report log-probabilities with this many alternatives.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of requests: prompt or messages, and settings.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of answers, in the order of --prompts.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of --prompts that run together.", min=1)] = 8,
    dtype: DtypeOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    quantize: QuantizeOption = None,
    kernels: KernelsOption = "auto",
    mesh: MeshOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate text and report TTFT, TPOT and E2E apart."""
    from pdx.sampling_options import SamplingOptions

    settings = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "stop": tuple(stop or ()), "ignore_eos": ignore_eos,
        "logprobs": logprobs,
    }  # fmt: skip
    options = SamplingOptions(**settings)  # checked before a model is loaded
    if (prompts is None) != (output is None):
        raise RequestError("--prompts and --output go together")
    if prompts is not None and prompt is not None:
        raise RequestError("give a PROMPT or --prompts, not both")
    run = {"kernels": kernels, "kv_dtype": kv_dtype}
    if prompts is not None:
        from pdx import batch_file

        requests = batch_file.read(prompts, options)
        batch_file.check_output(output, prompts)
        batch_file.run(_load(model, dtype, mesh, quantize), requests, output, batch_size=batch_size, **run)
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise RequestError("there is no prompt: pdx generate \"The capital of France is\"")
    messages = [{"role": "system", "content": system}] if system is not None else []
    request: Any = [*messages, {"role": "user", "content": text}] if chat or system is not None else text
    _generate_one(_load(model, dtype, mesh, quantize), request, options, as_json, run)


def _generate_one(model, request, options, as_json: bool, run: dict) -> None:
    from pdx import report_text
    from pdx.generation import stream

    completion = None
    for piece in stream(model, request, options, **run):
        if not as_json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        completion = piece.completion or completion
    if as_json:
        print(json.dumps(report_text.completion_fields(completion, run["kernels"]), ensure_ascii=False))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(report_text.summary(completion, run["kernels"]), file=sys.stderr)


def _load(model: str, dtype: str, mesh: str | None, quantize: str | None = None):
    from pdx.compilation import enable_cache
    from pdx.weights.load import load

    enable_cache()
    loaded = load(model, dtype=dtype, mesh=mesh, quantize=quantize)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List what is built in, what is in the cache, and what can be loaded."""
    from pdx import report_text
    from pdx.weights.listing import list_models

    rows = list_models()
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        report_text.print_models(rows)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="What to convert; anything --model takes.")],
    directory: Annotated[Path, typer.Argument(help="A new directory, which is a model argument from then on.")],
    dtype: DtypeOption = "auto",
) -> None:
    """Save config, tokenizer and parameters as a checkpoint that loads faster."""
    from pdx.weights.checkpoint import check_target, save

    check_target(directory)
    loaded = _load(model, dtype, None)
    save(loaded, directory)
    print(f"saved {loaded.name} to {directory}", file=sys.stderr)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A shape of `configs/`, a TOML file, or anything --model takes; weights "
                                         "are not read.")],
    on: Annotated[str, typer.Option("--chip", help="v5e, h100, ...; several as v5e-8.")] = "v5e",
    quantize: QuantizeOption = None,
    kv_dtype: Annotated[str | None, typer.Option(help="KV-cache: bfloat16, int8; without it as the weights.")] = None,
    dtype: Annotated[str, typer.Option(help="Of activations and unquantized weights.")] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Rows that decode together.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    context: Annotated[int, typer.Option(help="Tokens that a row holds.")] = 2048,
    slo_ttft: Annotated[float | None, typer.Option(help="Milliseconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Milliseconds a token.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Does a model fit a chip, how fast can it be there, and what should be switched on?"""
    from pdx import known
    from pdx import plan as planning

    seconds = [None if x is None else x / 1e3 for x in (slo_ttft, slo_tpot)]
    found = planning.make(model, known.config(model), on, quantize=quantize, kv_dtype=kv_dtype, dtype=dtype,
                          batch=batch, prompt=prompt, context=context, slo_ttft=seconds[0],
                          slo_tpot=seconds[1])  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        planning.show(found)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="What to quantize; anything --model takes.")],
    directory: Annotated[Path, typer.Argument(help="A new directory, which is a model argument from then on.")],
    policy: QuantizeOption = "int4",
    method: Annotated[str, typer.Option(help="rtn (to the nearest), awq (activation-aware scaling) or gptq.")] = "gptq",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text that awq and gptq look at; without it, docstrings of the standard library."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Of 512 tokens, taken from that text.", min=1)] = 16,
    dtype: DtypeOption = "auto",
) -> None:
    """Quantize a model, with a calibration text if need be, and save it as a checkpoint."""
    from pdx import calibration as calibrating
    from pdx import texts
    from pdx.weights.checkpoint import check_target, save
    from pdx.weights.progress import progress_bar

    check_target(directory)
    calibrating.check_method(method)
    if method == "rtn":
        done = _load(model, dtype, None, policy)
    else:
        text = texts.read(calibration, texts.calibration)
        loaded = _load(model, dtype, None)
        with progress_bar(unit="layers") as bar:
            done = calibrating.quantize_model(loaded, policy, text, method, sequences=sequences,
                                              progress=partial(bar, method))  # fmt: skip
    save(done, directory)
    print(f"saved {done.name} to {directory}", file=sys.stderr)


@bench_app.command("model")
def bench_model(
    model: ModelOption = DEFAULT_MODEL,
    prompt_tokens: Annotated[list[int] | None, typer.Option(help="Prefill length; more than one may be given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Decode batch size; more than one may be given.")] = None,
    peer: Annotated[bool, typer.Option(help="Also run transformers on the same weights, if it is installed.")] = True,
    quantize: Annotated[list[str] | None, typer.Option(help="Also run the model with its weights stored so; more than "
                                                       "one may be given.")] = None,
    dtype: DtypeOption = "auto",
    kernels: KernelsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode of a model, beside other ways of storing it, transformers, llama.cpp and this machine's memory
    bandwidth."""
    from pdx.bench import model as bench

    loaded = _load(model, dtype, None)
    others = {policy: _load(model, dtype, None, policy) for policy in quantize or ()}
    result = bench.run(loaded, prompt_tokens or (128, 1024), batch or (1, 8), peer=peer, kernels=kernels,
                       others=others)  # fmt: skip
    print(json.dumps(result.to_dict(), indent=2) if as_json else result.to_markdown())


@bench_app.command("memory")
def bench_memory(
    model: ModelOption = DEFAULT_MODEL,
    quantize: Annotated[list[str] | None, typer.Option(help="How weights are stored; more than one may be given, "
                                                       "`none` among them.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a model takes of this machine's memory, at the peak of loading and when it has run."""
    from pdx.bench import memory
    from pdx.weights.resolve import resolve

    resolve(model)
    found = memory.measure(model, quantize or ("none", "int8"))
    print(json.dumps([x.to_dict() for x in found]) if as_json else memory.to_markdown(found))


@eval_app.command("ppl")
def eval_ppl(
    model: Annotated[str, typer.Argument(help="Anything --model takes.")] = DEFAULT_MODEL,
    file: Annotated[Path | None, typer.Option(help="Text to score; without it, Python's language reference.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="What a quantized checkpoint is held against: the model that it was made of.")
    ] = None,
    quantize: QuantizeOption = None,
    kv_dtype: KvDtypeOption = "auto",
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    stride: Annotated[int, typer.Option(help="Tokens from one window to the next.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text; 0: all.", min=0)] = 4096,
    dtype: DtypeOption = "auto",
    kernels: KernelsOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity over a text, and KL divergence and top-1 agreement against the unquantized model."""
    import dataclasses

    from pdx import texts
    from pdx.bench import quality
    from pdx.quant import quantize_params

    text = texts.read(file, texts.evaluation)
    plain = _load(reference or model, dtype, None)
    if reference is not None:
        loaded = _load(model, dtype, None, quantize)
    else:
        loaded = dataclasses.replace(plain, params=quantize_params(plain.params, quantize)) if quantize else plain
    found = quality.evaluate(loaded, plain, text, kv_dtype=kv_dtype, length=window, stride=stride,
                             max_tokens=max_tokens, kernels=kernels)  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(f"perplexity      {found.perplexity:.4f} ({found.perplexity / found.reference_perplexity - 1:+.3%} against "
          f"{found.reference_perplexity:.4f} unquantized)\nKL divergence   {found.kl:.6f} nats a token\n"
          f"top-1 agreement {found.top1_agreement:.2%}\ntokens          {found.tokens}")


@app.command()
def tune(
    op: Annotated[str, typer.Argument(help="A kernel: flash_attention, decode_attention, paged_attention, "
                                           "quantized_matmul.")],
    target: Annotated[str | None, typer.Option(help="Rank for this chip (v5e, h100, ...) by static figures; without "
                                               "it, measure on this device.")] = None,
    case: Annotated[str | None, typer.Option(help="Only cases whose name holds this.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Keep the best tiles for the kernels to take.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Of the tables; else $PDX_TUNED, else the package's.")] = None,
) -> None:
    """Choose a kernel's tiles: measured on a real device, else ranked by what its compiler says."""
    from pallas_kernels import targets, tuning

    try:
        tuning.run(op, target, case, write, folder)
    except (ValueError, targets.CompilerMissing) as error:
        raise RequestError(str(error)) from error


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


if __name__ == "__main__":
    main()
