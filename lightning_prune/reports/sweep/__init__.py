"""What the arms of a sweep reached, kept and cost, and whether pruning beat its controls."""
