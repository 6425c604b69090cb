# Every target works on a fresh clone: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
ROOMS  := core privacy strategies transport clients server deliver benchmarks

.PHONY: help demo federation test test-slow test-clusters test-frameworks check fmt links proto wheel bench docs sbom clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Umbel needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY) ## train the bundled example on this machine and write its report
	$(BIN)/umbel run

federation: $(READY) ## a server and five node processes on this machine, one of them killed on the way
	deploy/federation.sh $(abspath $(BIN))/umbel

test: $(READY) ## the test suite (without the tests marked slow), in two processes of a thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-slow: $(READY) ## the tests marked slow
	$(BIN)/pytest -m slow

$(VENV)/.clusters: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dask,data,ray]' 'moto[s3,server]>=5,<6'
	@touch $@

test-clusters: $(VENV)/.clusters ## the tests on real clusters, which they start on this machine
	$(BIN)/pytest -m clusters

$(VENV)/.frameworks: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[tensorflow,jax,transformers]'
	@touch $@

test-frameworks: $(VENV)/.frameworks ## the tests that need Keras, TensorFlow, JAX, Flax or transformers
	$(BIN)/pytest -m frameworks

check: $(READY) links ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

links: ## the layout that type checkers and editors need (.links/umbel/...)
	@rm -rf .links && mkdir -p .links/umbel
	@for room in $(ROOMS); do ln -sfn ../../$$room .links/umbel/$$room; done
	@for file in umbel/*; do ln -sfn ../../$$file .links/umbel/$$(basename $$file); done

proto: links ## generate transport/link_pb2 (code of Protobuf 5.29 runs on 5.29 and all of 6)
	$(PYTHON) -m venv .proto
	.proto/bin/python -m pip install --quiet 'grpcio-tools==1.71.2' 'setuptools<81'
	.proto/bin/python -m grpc_tools.protoc -I.links --python_out=.links --pyi_out=.links umbel/transport/link.proto

wheel: $(READY) ## build dist/*.whl
	$(BIN)/python -m build --wheel

bench: $(READY) ## speed benchmarks
	$(BIN)/umbel bench speed

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(VENV)/.docs links ## build the documentation as a site in .site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

sbom: $(READY) ## list what is installed, with licences, as CycloneDX in sbom.json
	$(PYTHON) -m venv .sbom
	.sbom/bin/python -m pip install --quiet 'cyclonedx-bom>=5,<8'
	.sbom/bin/cyclonedx-py environment $(BIN)/python --output-file sbom.json

clean: ## remove what the other targets made
	rm -rf $(VENV) .links .proto .sbom sbom.json .site build dist *.egg-info
