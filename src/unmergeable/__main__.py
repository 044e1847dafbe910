"""`python -m unmergeable` is the command `unmergeable`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
