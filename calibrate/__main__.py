"""``python -m calibrate`` is the command ``calibrate``."""

from __future__ import annotations

import sys

from .cli.main import main

sys.exit(main())
