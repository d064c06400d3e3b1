"""The theory of docs/theory.md, run: a module for each experiment; `scripts/theory` runs all of them."""
