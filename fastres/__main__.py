"""``python -m fastres`` is the ``fastres`` command."""

import sys

from fastres.cli import main

if __name__ == "__main__":
    sys.exit(main())
