"""``python -m lorafit`` is the command ``lorafit``."""

import sys

from lorafit.cli import main

sys.exit(main())
