"""`pdx plan`: does a model fit a chip, how fast can it be there, what should be switched on?"""

from pdx.plan.advice import advice
from pdx.plan.figures import Plan, make

__all__ = ["Plan", "advice", "make"]
