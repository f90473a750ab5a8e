"""``python -m lightning_prune``: the command where it is not on the path."""

from lightning_prune.cli import main

if __name__ == "__main__":
    main()
