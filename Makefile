# make book   run the notebooks, render the book to book/_build/html
# make test   run the tests
# make lint   check the style and the types
# make clean  remove executed notebooks and rendered pages (records stay)
#
# Each makes the environment it needs in .venv, from pyproject.toml and constraints.txt, when one of them has changed.
#
#   make book PROFILE=smoke                 another profile of notebooks/profiles (a notebook with a folder of its own
#                                           there takes its profile from it)
#   make book PARAMETERS="-p budget 0.5"    parameters for papermill, above the profile
#   make book TORCH_INDEX=                  torch from the default index (on Linux: the CUDA build, several GB)
#   make test TESTS="tests/records/test_ledger.py -x"
#   make test WORKERS=8                    processes that share the tests

VENV        ?= .venv
PROFILE     ?= cpu
PARAMETERS  ?=
TESTS       ?=
WORKERS     ?= 2
# Where a small CPU build of torch comes from. Tried once, for torch alone; where it cannot be reached, the default
# index serves torch like everything else.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The first Python on the path that is new enough.
PYTHON      ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
                 $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

ifeq ($(wildcard notebooks/profiles/$(PROFILE).yaml),)
$(error PROFILE=$(PROFILE) is unknown; choose one of $(basename $(notdir $(wildcard notebooks/profiles/*.yaml))))
endif

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NAMES     := importance_scoring add_or_remove kl_or_mse gdn_to_gla selectors cost_of_selection oracle stability \
             sets_not_layers why_these_layers published_sets mixers_and_speed
EXECUTED  := $(NAMES:%=book/notebooks/%.ipynb)
# What a notebook's results depend on, besides its source.
INPUTS    := $(wildcard notebooks/profiles/$(PROFILE).yaml notebooks/profiles/*/$(PROFILE).yaml) \
             book/notebooks/.parameters \
             $(shell find hybridlib -name '*.py') $(wildcard data/teacher/*.safetensors data/corpus/* data/published/*)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: book test lint clean FORCE

book: $(EXECUTED)
	rm -rf book/_build
	$(BIN)/python book/generate.py
	$(BIN)/jupyter-book build book -W -n --keep-going
	@echo "The book: $(CURDIR)/book/_build/html/index.html"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf book/_build book/_generated book/notebooks

# glibc gives the memory of large tensors back whenever they are freed, and then waits for it again, page by page. Let it
# keep what it has.
KEEP      := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647

# A notebook runs under another name first: an interrupted run leaves no executed copy behind.
book/notebooks/%.ipynb: notebooks/%.ipynb $(INPUTS) | $(INSTALLED)
	$(KEEP) $(BIN)/papermill -k python3 $(PARAMETERS) $< book/notebooks/.$*.running.ipynb \
	    -f $(firstword $(wildcard notebooks/profiles/$*/$(PROFILE).yaml) notebooks/profiles/$(PROFILE).yaml)
	mv book/notebooks/.$*.running.ipynb $@

# Changes only when the profile or the parameters do, so that executed copies of others are not taken for these.
book/notebooks/.parameters: FORCE
	@mkdir -p $(@D)
	@echo '$(PROFILE) $(PARAMETERS)' | cmp -s - $@ || echo '$(PROFILE) $(PARAMETERS)' > $@

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) .ci/make_venv.py $(VENV)
	test -z "$(TORCH_INDEX)" || $(BIN)/python -m pip install --no-deps --retries 0 --timeout 10 \
	    --index-url "$(TORCH_INDEX)" -c constraints.txt torch || echo "torch will come from the default index."
	$(BIN)/python -m pip install -c constraints.txt -e '.[book,test]'
	@touch $@
