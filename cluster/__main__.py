"""`python -m cluster`: the `dsv4` command without its script."""

from cluster.cli import main

main()
