"""``python -m calibrate``: the same as the command ``calibrate``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
