"""Workloads, one in each module: what a module calls WORKLOAD is found by `workload.all_workloads`."""
