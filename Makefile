SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test check format readme docs docs-serve api reproduce bench new clean distclean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The interpreter that makes the virtual environment: `make PYTHON=/path/to/python run` to choose.
PYTHON ?= python3.13 python3.12 python3.11 python3 python
# Test processes, and extra arguments: `make test JOBS=4 ARGS="-k goose"`.
JOBS ?= 2
ARGS ?=

help: ## show this list
	@echo "pertoken: make TARGET, with TARGET one of"
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

run: $(STAMP) ## install, check this machine, decode a sample side by side
	@$(BIN)/pertoken doctor --short
	@$(BIN)/pertoken compare --max-new-tokens 28 # three minutes on two slow cores

test: $(STAMP) ## run the tests (JOBS=2, ARGS="-k goose")
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) $(ARGS)

check: $(STAMP) ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

readme: $(STAMP) ## write the README tables from reports/ and the catalogue
	$(BIN)/python -m pertoken.reproduce.readme

# The note about another version of mkdocs would be printed on every build.
docs: $(STAMP) ## build the site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

docs-serve: $(STAMP) ## show the site while you write on it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

api: $(STAMP) ## what changed in the public interface since the last tag
	@PYTHONPATH=docs $(BIN)/python -m _generate.api

reproduce: $(STAMP) ## check the papers' claims (ARGS="goose", default --all)
	$(BIN)/pertoken reproduce $(or $(ARGS),--all)

# The texts are kept per ARGS, so that an interrupted bench goes on and another one starts anew.
TEXTS = build/bench/texts-$(firstword $(shell echo '$(ARGS)' | cksum)).jsonl
bench: $(STAMP) ## time every method beside transformers' own (ARGS="--per-group 2" or "--prompts sample")
	$(BIN)/python bench/greedy_texts.py --out $(TEXTS) $(ARGS)
	$(BIN)/python bench/run.py --texts $(TEXTS) --out build/bench/decode.json \
	  hf plain hf-prompt-lookup prompt-lookup lookahead suffix \
	  token-recycling:budget=auto goose:budget=auto

new: $(STAMP) ## start the files of a paper (SLUG=my-paper, ARGS="--title ... --family decode")
	@test -n "$(SLUG)" || { echo "error: say which paper: make new SLUG=my-paper" >&2; exit 2; }
	@$(BIN)/pertoken new $(SLUG) $(ARGS)

clean: ## delete caches and built packages
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also delete the virtual environment (downloaded models stay)
	rm -rf $(VENV)

# Installed once; again only when the dependencies change. torch goes first and alone: asked for by
# its exact version it comes in the build that the configured index offers for this machine.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: no Python 3.11 or newer with the venv module found (tried $(PYTHON));" \
	      "install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@echo "installing into $(VENV) (the first time takes some minutes)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) --editable '.[dev]'
	@touch $@
