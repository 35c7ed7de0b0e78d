"""``python -m vdqc`` is ``vdqc``."""

import sys

from vdqc.cli import main

if __name__ == "__main__":
    sys.exit(main())
