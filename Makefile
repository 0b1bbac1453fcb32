# Everything runs from .venv, which `make setup` fills from the hashed locks under requirements/.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast chaos nightly lint types bench fuzz lock wheel licences audit clean

PACKAGES := protocol cache edge_agent cloud_worker cli bench demo

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup:  ## .venv with everything in it; returns at once when nothing changed
	@tools/setup.sh

demo: setup  ## a prompt answered by the demo pair, in exact mode
	@.venv/bin/pilotfish demo

test: setup lint types  ## every test, llama.cpp and vLLM in processes of their own
	@tools/test.sh

test-fast: setup  ## under a minute: no engine, no torch, nothing slow
	@.venv/bin/python -m pytest -q -n 3 --dist worksteal -m "not slow and not llamacpp and not vllm and not torch"

chaos: setup  ## state machines for >= 10,000 steps each, 200 killed workers, 20,000 rounds while everything breaks
	@CHAOS=nightly .venv/bin/python -m pytest -q --timeout 1800 tests/chaos tests/edge_agent/test_session_machine.py \
		-m "not llamacpp"
	@.venv/bin/pilotfish bench chaos

nightly: chaos fuzz  ## what takes too long for every change: chaos and a million hostile inputs

lint: setup  ## ruff: rules and format
	@.venv/bin/ruff check . && .venv/bin/ruff format --check --quiet .

types: setup  ## mypy, strict
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/pilotfish
	@MYPYPATH=.cache/types .venv/bin/mypy $(PACKAGES:%=-p pilotfish.%)
	@MYPYPATH=.cache/types:tests .venv/bin/mypy tests tools

bench: setup  ## every benchmark, quick
	@.venv/bin/pilotfish bench all --quick

FUZZ_EXECUTIONS ?= 1000000
fuzz: setup  ## hostile bytes through codec, worker and agent: FUZZ_EXECUTIONS of them, a million unless it says else
	@FUZZ_EXECUTIONS=$(FUZZ_EXECUTIONS) .venv/bin/python -m pytest tests/hostile/test_fuzz*.py --timeout 3600 \
		-o log_cli=true --log-cli-level=INFO

lock: setup  ## resolve again and write requirements/*.txt (LOCK="--upgrade edge" narrows it)
	@.venv/bin/python tools/lock.py $(LOCK)

wheel: setup  ## dist/pilotfish-….whl
	@rm -rf build  # setuptools packs what an older build left there, modules that are gone included
	@.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

licences: setup  ## write docs/licences.md from the locks and what is installed
	@.venv/bin/python tools/licences.py > .cache/licences.md && mv .cache/licences.md docs/licences.md

audit: setup  ## known flaws of the locked versions (needs a network; AUDIT="edge" narrows it)
	@.venv/bin/python tools/audit.py $(AUDIT)

clean:  ## remove what was built or cached, .venv excepted
	@rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
