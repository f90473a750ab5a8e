"""What a network costs: parameters, operations, measured latency."""

from lightning_prune.costs.flops import Costs, Count, ModuleCosts, count_costs

__all__ = ["Costs", "Count", "ModuleCosts", "count_costs"]
