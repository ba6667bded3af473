"""``python -m veneer`` is the command ``veneer``."""

import sys

from veneer.cli import main

sys.exit(main())
