"""`python -m knport` is the command `knport`."""

import sys

from knport.cli import main

if __name__ == "__main__":
    sys.exit(main())
