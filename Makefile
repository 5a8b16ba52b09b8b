# Every target first makes what it needs (tools/env.py): SGLang's environment, once, outside the checkout.
#   VENV=DIR     an environment elsewhere; one of your own is used as it is
#   PYTHON=...   the Python (3.11 or 3.12) to make it with
#   ARGS=...     passed on: make test ARGS="-k rows -x", make demo ARGS="--port 31000"; make bench: to bench/compare.py

VERSION_OK := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(VERSION_OK)' 2>/dev/null && { echo $$p; break; }; done)
ENV = $(PYTHON) tools/env.py $(if $(VENV),--venv '$(VENV)')
RUN = .local/bin/python

.PHONY: help demo test test-gpu test-deep check bench clean-env env python

help:
	@echo 'make demo        chat with SmolLM2 on a real SGLang server, with a look at the cache after each turn'
	@echo 'make test        the tests that need no GPU'
	@echo 'make check       ruff and mypy'
	@echo 'make test-gpu    the tests that need an NVIDIA GPU'
	@echo 'make test-deep   long property runs'
	@echo 'make bench       the benchmarks; results go to bench/results'
	@echo 'make env         only what the others do first: SGLang in ~/.cache/sgl-vtensor (11 GB, 5 minutes, once)'
	@echo 'make clean-env   remove that environment'

demo: env
	@.local/bin/sgl-vtensor demo $(ARGS)

test: env
	$(RUN) -m pytest -m 'not gpu and not deep' $(ARGS)

test-gpu: env
	$(RUN) -m pytest -m gpu $(ARGS)

test-deep: env
	$(RUN) -m pytest -m deep $(ARGS)

check: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: env
	@set -e; for file in bench/bench_*.py; do echo "== $$file"; $(RUN) $$file; done
	$(RUN) bench/compare.py $(ARGS)

env: python
	@$(ENV)
	@$(if $(filter env,$(MAKECMDGOALS)),echo 'ready; now: export PATH=$(CURDIR)/.local/bin:$$PATH')

clean-env: python
	@$(ENV) --clean

python:
	@$(or $(PYTHON),python3) -c '$(VERSION_OK)' 2>/dev/null || { \
		echo 'SGLang 0.5.23 needs Python 3.11 or 3.12: install one, or name it, as in make PYTHON=/usr/bin/python3.12' >&2; \
		exit 1; }
