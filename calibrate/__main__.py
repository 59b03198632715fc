"""``python -m calibrate``: the same as the command ``calibrate``."""

from __future__ import annotations

import sys

from .cli.main import main

sys.exit(main())
