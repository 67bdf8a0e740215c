# make demo: from a fresh machine to a streamed answer. make serve: the demo's pipeline behind OpenAI's interface.
# make test: the suite. All of them set up .venv themselves.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
# What is never imported is never compiled to bytecode.
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
# The server that a PyPI package ships, alone and aside: what it depends on would pull our own packages back by years.
TRITON := nvidia-pytriton==0.7.0
# Two files of tests at a time, PyTorch with a thread for each. In their order, because those of few tests are not the short ones.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# make train: both drafters, from nothing or from the first drafter START, for MINUTES; they come into build/training.
MINUTES ?= 90
PIPELINE ?= pipeline.yaml
START ?=

.PHONY: demo serve train test test-all deploy-check lint clean

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python benchmarks/demo.py pipeline.yaml --output build

serve: $(VENV)/demo.stamp
	$(VENV)/bin/python export/build.py pipeline.yaml --output build
	@$(VENV)/bin/python -m gateway & gateway=$$!; trap 'kill $$gateway 2>/dev/null' EXIT; \
		$(VENV)/bin/python triton_repo/serve.py build

# Two thirds of the time for the first drafter, on whose weights and rejections the second one's training starts.
train: $(VENV)/train.stamp
	$(VENV)/bin/python -m training.train $(PIPELINE) --drafter dflash --minutes $$(($(MINUTES) * 2 / 3)) $(if $(START),--start $(START))
	$(VENV)/bin/python -m training.calibrate $(PIPELINE) --drafter dflash
	$(VENV)/bin/python -m training.train $(PIPELINE) --drafter vp --minutes $$(($(MINUTES) - $(MINUTES) * 2 / 3))
	$(VENV)/bin/python -m training.calibrate $(PIPELINE) --drafter vp

test: $(VENV)/test.stamp lint
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/test.stamp lint
	$(PYTEST) -m "not gpu"

# What the cluster, Prometheus and Grafana are given, without any of them.
deploy-check: $(VENV)/test.stamp
	$(PYTEST) tests/deploy

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.10, 3.11 or 3.12 is needed; name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/tritonserver: | $(VENV)/bin/python
	@test -n "$$(command -v tritonserver)" || $(PIP) --no-deps --target $@ $(TRITON)

$(VENV)/demo.stamp: pyproject.toml Makefile | $(VENV)/tritonserver
	@echo "installing into $(VENV); the first time this takes some minutes"
	$(PIP) -e ".[cpu,export,gateway]"
	@touch $@

$(VENV)/train.stamp: pyproject.toml Makefile | $(VENV)/bin/python
	@echo "installing into $(VENV) what training needs; the first time this takes some minutes"
	$(PIP) -e ".[train]"
	@touch $@

# All that the demo and training need is among it.
$(VENV)/test.stamp: pyproject.toml Makefile | $(VENV)/tritonserver
	@echo "installing into $(VENV) what the tests need; the first time this takes some minutes"
	$(PIP) -e ".[cpu,export,train,dev]"
	@test -n "$$(command -v promtool)" || ! command -v apt-get >/dev/null || { cd $(VENV) && apt-get download -qq prometheus && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 -C bin ./usr/bin/promtool && rm prometheus_*.deb; } || \
		echo "without promtool Prometheus's rules are not checked"
	@touch $@ $(VENV)/demo.stamp $(VENV)/train.stamp

clean:
	rm -rf build $(VENV)
