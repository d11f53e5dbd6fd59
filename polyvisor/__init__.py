"""Polyvisor: one virtual machine, any hypervisor."""

__version__ = "0.1.0"
