"""What a phase costs: FLOPs, bytes and seconds, predicted from a configuration and a chip; and the chips."""

from pdx.cost.capacity import RESERVE, best_batch, critical_batch, end_to_end, largest_batch, largest_context, room
from pdx.cost.phases import Cost, Phase, Setup, visible_pairs

__all__ = [
    "RESERVE",
    "Cost",
    "Phase",
    "Setup",
    "best_batch",
    "critical_batch",
    "end_to_end",
    "largest_batch",
    "largest_context",
    "room",
    "visible_pairs",
]
