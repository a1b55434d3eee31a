# Every target gets the machine ready for itself (Debian 12, Ubuntu 24.04 or newer).

# kernels to test on, the one with the most tests first, and the interpreter to test with
K ?= 7.3 6.18 6.12
export PYTHON ?= python3
# seconds for the device tests on one kernel
T ?= 4200
# so many machines at once
J ?= $(shell nproc)

.NOTPARALLEL:
.PHONY: help test lint unit device bench demo docs build sanitized vm wheels clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

test: lint unit device ## everything: lint, unit tests, device tests on three kernels

lint: build ## style, types, layers, C warnings
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy --strict --no-error-summary ublkpy tests bench scripts examples
	@.venv/bin/lint-imports
	@scripts/check-c

unit: build ## tests that need no driver
	@.venv/bin/python -m pytest tests/unit

device: build sanitized vm wheels ## tests with a real driver, on the kernels K="7.3 6.18 6.12"
	@found=$$(PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -q --collect-only tests/device tests/systemd) || \
		{ echo "$$found"; exit 1; } # and the slower machines find the tests compiled
	@$(PYTHON) -m tests.vm -j $(J) -k "$(K)" -t $(T) --pytest tests/device \
		--and -k "$(firstword $(K))" -t $(T) --systemd tests/systemd/prepare --pytest tests/systemd

bench: build ## speed, in instructions: SUBJECTS="null loop" WORKLOADS= PEER=path/to/kublk BASE= JSON= PLOT= K=7.3
	@scripts/setup bench
	@.venv/bin/python -m bench --kernel "$(if $(filter file,$(origin K)),7.3,$(K))" --subjects "$(SUBJECTS)" \
		--workloads "$(WORKLOADS)" --base "$(BASE)" $(if $(PEER),--peer "$(PEER)") $(if $(JSON),--json "$(JSON)") \
		$(if $(PLOT),--plot "$(PLOT)")

demo: build ## a file becomes a disk, step by step
	@scripts/demo

docs: build ## the API reference, docs/api.md, from the docstrings
	@.venv/bin/python scripts/api.py

build: ## .venv with ublkpy and its tools
	@scripts/setup build

sanitized: build ## the C core once more, with sanitizers
	@scripts/setup sanitized

vm: ## QEMU and the kernels
	@scripts/setup vm

wheels: build ## what ublkpy is installed with
	@scripts/setup wheels

clean: ## remove what the others made here (the kernels stay in ~/.cache/ublkpy)
	@rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find ublkpy tests bench -name '*.so' -delete -o -name __pycache__ -prune -exec rm -rf {} +
