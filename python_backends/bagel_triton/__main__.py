"""``python -m bagel_triton``: the command line."""

import sys

from bagel_triton.serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
