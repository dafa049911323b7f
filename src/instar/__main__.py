"""``python -m instar`` is the command ``instar``, for launchers such as ``torchrun -m instar evaluate ...``."""

import sys

from instar.cli import main

if __name__ == "__main__":
    sys.exit(main())
