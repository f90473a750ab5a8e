"""What a network costs: parameters, operations, measured latency."""
