"""`python -m vattention`, the same as the command `vattention`."""

import sys

from vattention.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
