"""What a model keeps between calls: the generators of the shapes it met, and idle caches."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from pdx.cache.idle import IdleCaches
from pdx.generation.generator import SMALLEST_CAPACITY, Generator, cache_dtype
from pdx.generation.speculation import SpeculativeGenerator
from pdx.shapes import round_up
from pdx.speculative.options import Speculation
from pdx.weights.load import Model, load

# Shapes whose programs a model keeps.
MOST_GENERATORS = 16


@dataclass
class _ModelCaches:
    """What a model keeps between calls: idle caches, and generators (programs) by shape, those used last at the end."""

    caches: IdleCaches = field(default_factory=IdleCaches)
    generators: OrderedDict[tuple, Generator] = field(default_factory=OrderedDict)
    drafts: dict[str, Model] = field(default_factory=dict)

    def with_draft(self, speculation: Speculation, model: Model) -> Speculation:
        """With its draft model loaded, as `model` is; each is loaded once."""
        name = speculation.model
        if name is None or isinstance(name, Model):
            return speculation
        if name not in self.drafts:
            self.drafts[name] = load(name, dtype=model.dtype, mesh=model.mesh)
        return replace(speculation, model=self.drafts[name])


# It goes when the model goes.
_MODEL_CACHES: weakref.WeakKeyDictionary[Model, _ModelCaches] = weakref.WeakKeyDictionary()
_MODEL_CACHES_LOCK = threading.Lock()


def generator(
    model: Model, *, rows: int, tokens: int, kv_dtype=None, speculation: Speculation | None = None, **settings
) -> Generator:
    """The model's generator for `rows` requests of up to `tokens` tokens; made when it is first asked for.

    The programs of the last `MOST_GENERATORS` shapes are kept.
    """
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    capacity = min(capacity, round_up(model.config.max_context, 128))
    kv_dtype = cache_dtype(kv_dtype, model)
    with _MODEL_CACHES_LOCK:
        kept = _MODEL_CACHES.setdefault(model, _ModelCaches())
        kind: Callable[..., Generator] = Generator
        if speculation is not None:
            speculation = kept.with_draft(speculation, model)
            kind = partial(SpeculativeGenerator, speculation=speculation)
        key = (rows, capacity, str(kv_dtype), speculation, *sorted(settings.items()))
        if key not in kept.generators:
            kept.generators[key] = kind(
                model, rows=rows, capacity=capacity, kv_dtype=kv_dtype, caches=kept.caches, **settings
            )
        kept.generators.move_to_end(key)
        while len(kept.generators) > MOST_GENERATORS:
            kept.generators.popitem(last=False)
        return kept.generators[key]
