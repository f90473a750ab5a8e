"""Composable PyTorch Lightning callbacks for pruning."""
