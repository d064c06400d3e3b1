"""`python -m sdvae` is the `sdvae` command."""

from sdvae.cli.main import main

main()
