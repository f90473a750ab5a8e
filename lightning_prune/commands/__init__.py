"""What ``lightning-prune``'s own commands do, one module each: arguments in, text or a file out."""
