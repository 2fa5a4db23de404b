"""`pdx bench load`: measures an engine under load."""

from pdx.bench.load.measure import LoadResult, Served, counted, run
from pdx.bench.load.side_by_side import Variant, compare, variants

__all__ = ["LoadResult", "Served", "Variant", "compare", "counted", "run", "variants"]
