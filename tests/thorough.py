"""How much of what takes long is tested: by default a part of it, all with POLYVISOR_TEST_ALL=1 in the environment."""

from __future__ import annotations

import os

THOROUGH = bool(os.environ.get("POLYVISOR_TEST_ALL"))
# A walk through a command's steps whose every step takes long takes each one, or each fifth.
EVERY = 1 if THOROUGH else 5
