# Nothing runs that a measurement has not started: these services are begun by the workloads that need them.
systemctl disable nginx.service postgresql.service 2>/dev/null || true
