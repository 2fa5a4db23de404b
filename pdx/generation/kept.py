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
from pdx.speculative import shipped
from pdx.speculative.draft_file import is_draft_file, load_draft
from pdx.speculative.options import Speculation
from pdx.weights.load import Model, load

# Shapes whose programs a model keeps.
MOST_GENERATORS = 16


@dataclass
class _ModelCaches:
    """What a model keeps between calls. The generator used last stands at the end."""

    caches: IdleCaches = field(default_factory=IdleCaches)
    generators: OrderedDict[tuple, Generator] = field(default_factory=OrderedDict)
    drafts: dict[tuple[str, str], Model] = field(default_factory=dict)


# An entry is freed together with its model.
_MODEL_CACHES: weakref.WeakKeyDictionary[Model, _ModelCaches] = weakref.WeakKeyDictionary()
_MODEL_CACHES_LOCK = threading.Lock()


def generator(
    model: Model, *, rows: int, tokens: int, kv_dtype=None, speculation: Speculation | None = None, **settings
) -> Generator:
    """The model's generator for `rows` requests of up to `tokens` tokens; made on first use.

    A model keeps the `MOST_GENERATORS` generators that were used last.
    """
    capacity = SMALLEST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    capacity = min(capacity, round_up(model.config.max_context, 128))
    kv_dtype = cache_dtype(kv_dtype, model)
    kind: Callable[..., Generator] = Generator
    if speculation is not None:
        speculation = with_draft(speculation, model)
        kind = partial(SpeculativeGenerator, speculation=speculation)
    with _MODEL_CACHES_LOCK:
        kept = _MODEL_CACHES.setdefault(model, _ModelCaches())
        key = (rows, capacity, str(kv_dtype), speculation, *sorted(settings.items()))
        if key not in kept.generators:
            kept.generators[key] = kind(
                model, rows=rows, capacity=capacity, kv_dtype=kv_dtype, caches=kept.caches, **settings
            )
        kept.generators.move_to_end(key)
        while len(kept.generators) > MOST_GENERATORS:
            kept.generators.popitem(last=False)
        return kept.generators[key]


def with_draft(speculation: Speculation, model: Model) -> Speculation:
    """The same with its draft model or head loaded, in the type and on the mesh of `model`. Each name is loaded once.

    Raises RequestError where no name is given and none comes with pdx for the model.
    """
    if speculation.proposer not in ("draft", "eagle") or isinstance(speculation.model, Model):
        return speculation
    name = speculation.model or str(shipped.find(model.name, speculation.proposer))
    with _MODEL_CACHES_LOCK:
        drafts = _MODEL_CACHES.setdefault(model, _ModelCaches()).drafts
    key = (speculation.proposer, str(name))
    if key not in drafts:  # not under the lock: loading takes seconds, and other models need not wait for it
        settings = {"dtype": model.dtype, "mesh": model.mesh}
        small = speculation.proposer == "eagle" or is_draft_file(name)
        made = load_draft(name, speculation.proposer, **settings) if small else load(name, **settings)
        drafts.setdefault(key, made)
    return replace(speculation, model=drafts[key])
