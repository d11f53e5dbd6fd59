# The short way to everything. `make` alone lists what there is.
.POSIX:
.PHONY: help setup demo test test-lab check format bench clean

# uv as installed, or as scripts/setup.sh installs it. Looked up when a recipe runs.
UV = $$(command -v uv || echo .venv-tools/bin/uv)

help:
	@echo 'make demo      set up what is missing, then start a virtual machine and log in to it'
	@echo 'make test      set up what is missing, then check and test everything that runs on this machine itself'
	@echo 'make test-lab  the same for what takes long: real KVM and real Xen hosts, inside emulation, and Debian guests (half an hour)'
	@echo 'make check     formatting, lint and types only'
	@echo 'make bench     set up what is missing, then compare with bare QEMU and libvirt (under 15 minutes)'
	@echo 'make format    format the code'
	@echo 'make clean     remove what was built in this directory'
	@echo 'No make? sh scripts/setup.sh does the set-up.'

setup:
	@sh scripts/setup.sh demo

demo: setup
	@sh scripts/demo.sh

# One worker more than CPUs: a third of the time tests wait for a guest or a process.
test:
	@sh scripts/setup.sh test
	@$(MAKE) --no-print-directory check
	$(UV) run pytest -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder --ignore tests/lab
	@echo 'Not run here: the tests on real KVM and real Xen hosts and with Debian guests, which take half an hour: make test-lab'

# One host at a time, more or less: on a busy machine emulated guests meet time limits that real ones don't.
test-lab:
	@sh scripts/setup.sh test
	$(UV) run pytest tests/lab

check:
	$(UV) run ruff check
	$(UV) run ruff format --check
	$(UV) run mypy

format:
	$(UV) run ruff check --fix
	$(UV) run ruff format

bench:
	@sh scripts/setup.sh bench
	$(UV) run python -m bench

clean:
	rm -rf .venv .venv-tools .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build reports
