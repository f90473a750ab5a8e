"""A grid of networks, methods, budgets and seeds in which every arm may spend the same training cost."""
