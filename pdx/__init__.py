"""pdx: LLM inference as two problems, prefill and decode, in JAX and Pallas.

Names are imported on first use, so `import pdx` and `pdx --help` stay light. The first name raises VersionError if the
releases of jax, jaxlib and libtpu (or the CUDA plugin) do not fit together.

The examples in the docstrings share one tiny random model, and run without a download:

    >>> import jax, jax.numpy as jnp, pdx
    >>> cfg = pdx.ModelConfig(
    ...     "llama", vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64,
    ...     max_context=256)
    >>> params = pdx.init_params(cfg, jax.random.key(0))
    >>> tokens = jnp.array([[5, 9, 2], [7, 1, 0]])  # the second row has two tokens and one of padding
    >>> lengths = jnp.array([3, 2])
"""

from importlib import import_module

__version__ = "0.1.0"

_WHERE = {
    "ModelConfig": "pdx.config",
    "RopeConfig": "pdx.config",
    "PdxError": "pdx.errors",
    "load": "pdx.weights.load",
    "Model": "pdx.weights.load",
    "forward": "pdx.model",
    "init_params": "pdx.model",
    "init_cache": "pdx.cache.dense",
    "DenseCache": "pdx.cache.dense",
    "init_paged_cache": "pdx.cache.paged",
    "PagedCache": "pdx.cache.paged",
    "copy_pages": "pdx.cache.paged",
    "page_groups": "pdx.cache.paged",
    "prefill": "pdx.steps",
    "decode_step": "pdx.steps",
    "decode_many": "pdx.steps",
    "verify": "pdx.steps",
    "mixed_step": "pdx.steps",
    "SamplingOptions": "pdx.sampling.options",
    "SamplingState": "pdx.sampling.sampler",
    "Tokenizer": "pdx.tokenizer",
    "Speculation": "pdx.speculative.options",
    "generate": "pdx.generation",
    "stream": "pdx.generation",
    "Engine": "pdx.engine.engine",
    "EngineConfig": "pdx.engine.config",
    "EngineRequest": "pdx.engine.request",
    "compare": "pdx.bench.compare",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'pdx' has no attribute {name!r}")
    if name != "PdxError":
        # Before jax is imported: with a libtpu of another release the process would end without a word.
        import_module("pdx.installation.versions").check()
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
