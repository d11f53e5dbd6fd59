"""Fixtures that several modules of this ring share."""

from tests.unit.xen_host import vm, xen

__all__ = ["vm", "xen"]
