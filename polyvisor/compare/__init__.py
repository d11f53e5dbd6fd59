"""Comparing hypervisors: the same guest with the same work on each, measured in turn, and what the numbers can bear."""
