"""What a network costs: parameters, operations, measured latency."""

from lightning_prune.costs.flops import Costs, Count, ModuleCosts, count_costs
from lightning_prune.costs.latency import Latency, LatencyComparison, RunAs, compare_latency, measure_latency
from lightning_prune.costs.savings import Savings, measure_savings

__all__ = [
    "Costs",
    "Count",
    "Latency",
    "LatencyComparison",
    "ModuleCosts",
    "RunAs",
    "Savings",
    "compare_latency",
    "count_costs",
    "measure_latency",
    "measure_savings",
]
