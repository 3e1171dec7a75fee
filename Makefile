# Everything a checkout needs, on a machine with Python 3.11+, a C compiler and make. `make demo` and `make test` do their own set-up.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := setup.py pyproject.toml $(wildcard rt/*.pyx rt/*.pxi rt/*.h)
DEBIAN := python3-venv python3-dev iproute2 iputils-ping openssh-server rsync graphviz slurmd slurmctld slurm-client munge  # the build; then hosts of the tests, and a Slurm
N ?= 4

.PHONY: demo demo-server test test-rdma check docs peers results wheel packages clean

demo: .stamp-build  ## train a small network on handwritten digits over 4 ranks
	$(BIN)/rt.launch -n $(N) examples/train_digits.py --compare
demo-server: .stamp-build  ## answer HTTP from a network that is spread over 4 ranks, until Ctrl-C
	$(BIN)/rt.launch -n $(N) examples/server.py

test: .stamp-build  ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)
test-rdma: .stamp-build  ## the tests on RDMA verbs, in a guest with Soft-RoCE that qemu emulates (as root, installs what that needs)
	$(BIN)/python tests/rdma_guest.py
check: .stamp-build  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest rt._fastpath --mypy-config-file pyproject.toml --allowlist .ci/stubtest-allow --ignore-unused-allowlist
	$(BIN)/cython-lint --max-line-length 140 rt/*.pyx rt/*.pxi

docs: .stamp-build  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q --strict

peers: .venv-peers/.stamp  ## torch (gloo), MLX and MPI, to measure against

.venv-peers/.stamp: bench/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -r bench/peers.txt
	touch $@
results: .stamp-build peers  ## measure, then write the tables and pictures of README.md and docs/performance.md
	$(BIN)/python -m bench.readme README.md docs/all_reduce.png gloo,mlx,mpich,openmpi
	RT_SHM=0 $(BIN)/python -m bench.readme docs/performance.md docs/all_reduce_tcp.png gloo,mlx
wheel: .stamp-build  ## a wheel to copy to hosts without a compiler
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

.stamp-build: .stamp-venv $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

.stamp-venv: pyproject.toml .ci/dev-requirements | packages
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip $$($(BIN)/python .ci/dev-requirements)
	touch $@

packages:  ## Debian packages: installed as root, else named
	@command -v dpkg >/dev/null || exit 0; \
	missing=$$(for p in $(DEBIAN); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); [ -z "$$missing" ] || \
	if [ $$(id -u) = 0 ]; then apt-get update -qq && apt-get install -y -qq $$missing; \
	else echo "missing Debian packages; run: sudo apt-get install $$missing" >&2; fi

clean:
	rm -rf build dist site .venv .venv-peers .stamp-* rt/*.so rt/_fastpath.c *.egg-info
