# make demo    train on the toy world, evaluate, index, search: runs/demo
# make photos  train on photographs with a pretrained pair: CAPTIONS=captions.json IMAGES=folder
# make test    every test
# make docs    the documentation as a site: site/
# make container  the image of the server, where docker is; PyTorch from another index: make container TORCH_INDEX=URL
# Each sets up .venv on first use, from setup.cfg and constraints.txt: make demo what it needs itself, the others all.
PYTHON ?= python3
BIN := .venv/bin


.PHONY: demo photos test lint types docs container clean
demo: .venv/demo
	$(BIN)/fromage toy demo --out runs/demo

photos:
	@test -n "$(CAPTIONS)" -a -n "$(IMAGES)" || { echo "name captions in COCO's format and the folder of their photographs: make photos CAPTIONS=captions_val2017.json IMAGES=val2017 (COCO's are at cocodataset.org)"; exit 1; }
	@$(MAKE) --no-print-directory .venv/photos
	$(BIN)/fromage photos "$(CAPTIONS)" --images "$(IMAGES)" --out runs/photos

test: .venv/ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: .venv/ready
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

container:
	docker build --build-arg TORCH_INDEX=$(TORCH_INDEX) --tag fromage .
	docker run --rm fromage --version

.venv/demo: EXTRAS := demo,serve
.venv/photos: EXTRAS := demo,serve,gguf
.venv/ready: EXTRAS := dev
.venv/demo .venv/photos .venv/ready: setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch .venv/demo $(if $(filter .venv/ready,$@),.venv/photos) $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
