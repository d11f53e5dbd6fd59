"""The lab: real KVM and real Xen hosts inside emulation, for trying, testing and comparing."""
