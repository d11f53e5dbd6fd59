"""Xen, through its own toolstack `xl`."""
