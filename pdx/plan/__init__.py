"""`pdx plan`: predicts whether a model fits a chip, how fast it can be there, and which optimizations pay."""

from pdx.plan.advice import advice
from pdx.plan.figures import Plan, make

__all__ = ["Plan", "advice", "make"]
