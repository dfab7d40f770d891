"""``python -m tiltflow``."""

import sys

from tiltflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
