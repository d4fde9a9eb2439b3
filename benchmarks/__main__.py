"""`python -m benchmarks COMMAND`: as `fasttune bench COMMAND`, where fasttune is not installed."""

import sys

from fasttune.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
