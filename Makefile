# make demo and make test do all their own set-up. VENV=elsewhere puts the environment elsewhere.
VENV ?= .venv
PYTHON ?= python3
override VENV := $(abspath $(VENV))
# Modules are compiled when they are first imported; where Python may not write them, each process would compile torch anew, ten seconds
RUN = PATH="$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(VENV)" PYTHONDONTWRITEBYTECODE=

.PHONY: demo test install export readme lint clean help

help:
	@echo "make demo      sample faces, training, report, prediction (installs what it needs)"
	@echo "make test      everything CI checks"
	@echo "make export    notebooks -> modules, README, docs"
	@echo "make clean     remove the demo's folder and caches"

install:
	@$(PYTHON) tools/install.py "$(VENV)"

demo: install
	$(RUN) fastsmile demo --out "$$(mktemp -d)/demo"

test: install
	@$(RUN) python tools/check.py

export: install
	$(RUN) nbdev-export
	$(RUN) nbdev-clean
	$(RUN) python tools/readme.py

clean:
	rm -rf fastsmile-demo .pytest_cache .ruff_cache .hypothesis build *.egg-info
