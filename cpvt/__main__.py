"""`python -m cpvt` and `torchrun -m cpvt`: the same as the command `cpvt`."""

from cpvt.cli import main

main()
