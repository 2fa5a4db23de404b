"""What `import pdx` gives, for type checkers and editors: the names that `__init__.py` resolves on first use."""

from pdx.bench.compare import compare as compare
from pdx.cache.dense import DenseCache as DenseCache
from pdx.cache.dense import init_cache as init_cache
from pdx.cache.paged import PagedCache as PagedCache
from pdx.cache.paged import copy_pages as copy_pages
from pdx.cache.paged import init_paged_cache as init_paged_cache
from pdx.cache.paged import page_groups as page_groups
from pdx.config import ModelConfig as ModelConfig
from pdx.config import RopeConfig as RopeConfig
from pdx.engine.config import EngineConfig as EngineConfig
from pdx.engine.engine import Engine as Engine
from pdx.engine.request import EngineRequest as EngineRequest
from pdx.errors import PdxError as PdxError
from pdx.generation import generate as generate
from pdx.generation import stream as stream
from pdx.model import forward as forward
from pdx.model import init_params as init_params
from pdx.sampling.options import SamplingOptions as SamplingOptions
from pdx.sampling.sampler import SamplingState as SamplingState
from pdx.speculative.options import Speculation as Speculation
from pdx.steps import decode_many as decode_many
from pdx.steps import decode_step as decode_step
from pdx.steps import mixed_step as mixed_step
from pdx.steps import prefill as prefill
from pdx.steps import verify as verify
from pdx.tokenizer import Tokenizer as Tokenizer
from pdx.weights.load import Model as Model
from pdx.weights.load import load as load

__version__: str
