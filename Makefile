# Everything runs in .venv, which is made from lock files with exact versions and hashes: requirements-serve.lock for the
# server (also on PostgreSQL) and for building the wheel, requirements.lock for the tests and checks as well.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-compile
# On all cores, which pip does on one. Some packages have files that are not for this Python.
COMPILE_PACKAGES := $(BIN)/python -m compileall -qq -j 0 .venv/lib || :

.PHONY: install serve test test-extended test-interpreters check bench faults lock swagger-ui console-libraries pictures wheel clean

install: .venv/.installed

.venv/.serves: requirements-serve.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tokenauth needs Python 3.11 or newer:\
	 name one, as in \`make serve PYTHON=python3.11\`."; exit 1; }
	@echo "Making .venv, with $$($(PYTHON) --version)..."
	@$(PYTHON) -m venv .venv
	@echo "Installing $$(grep -c '^[^ #].*==' $<) packages into it, from $<..."
	@$(PIP) --require-hashes -r $<
	@$(PIP) --no-build-isolation --no-deps -e .
	@$(COMPILE_PACKAGES)
	@touch $@

.venv/.installed: .venv/.serves requirements.lock
	@echo "Installing what tests and checks need into .venv, from requirements.lock..."
	@$(PIP) --require-hashes -r requirements.lock
	@$(COMPILE_PACKAGES)
	@touch $@

# Uses ./tokenauth.toml if there is one (`.venv/bin/tokenauth init`), or else config.toml.
serve: .venv/.serves
	@$(BIN)/tokenauth serve $(if $(HOST),--host "$(HOST)") $(if $(PORT),--port "$(PORT)")

# Tests start many processes: bytecode is kept, whatever the environment says.
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -o longest_test=300 -n 6 --dist loadfile --no-loadscope-reorder

# What each change needs. The rest is in test-extended: what takes long and few changes concern.
test: install
	$(TEST) -m "not faults and not extended"

test-extended: install
	$(TEST) -m "extended and not faults"

test-interpreters: install
	.ci/interpreters

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin tokenauth migrations

bench: install
	$(BIN)/python -m bench

# All: `make faults`. One of them: `make faults FAULTS=tests/system/faults/test_power.py`. A tenth of the rounds and
# minutes: `make faults TOKENAUTH_FAULTS=0.1`.
FAULTS ?= tests
TOKENAUTH_FAULTS ?= 1
faults: install
	@echo "All long fault tests take about 4 hours on 2 cores. docs/promises.md lists them, and how to choose."
	TOKENAUTH_FAULTS=$(TOKENAUTH_FAULTS) $(BIN)/pytest -m faults --durations=20 $(FAULTS)

# The pictures of the console in docs/console.md.
pictures: install
	mkdir -p docs/images
	PICTURES=docs/images $(BIN)/pytest -p no:xdist -m faults tests/system/browser/test_console_pictures.py

wheel: .venv/.serves
	$(BIN)/python -m hatchling build -t wheel

COMPILE := $(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host
lock:
	$(PIP) pip-tools
	$(COMPILE) --extra dev --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra build,postgres --constraint requirements.lock --output-file requirements-serve.lock pyproject.toml

# The page at /docs: two files of npm's swagger-ui-dist, unchanged and compressed.
SWAGGER_UI := 5.35.0
swagger-ui:
	npm pack --silent swagger-ui-dist@$(SWAGGER_UI)
	tar xzf swagger-ui-dist-$(SWAGGER_UI).tgz
	for file in swagger-ui-bundle.js swagger-ui.css; do gzip -9nc package/$$file > tokenauth/web/pages/docs/$$file.gz; done
	cp package/LICENSE tokenauth/web/pages/docs/LICENSE.swagger-ui
	{ cat package/NOTICE; echo; cat package/swagger-ui-bundle.js.LICENSE.txt; } > tokenauth/web/pages/docs/NOTICE.swagger-ui
	rm -r package swagger-ui-dist-$(SWAGGER_UI).tgz

# What the console loads: npm's htm, in its form with Preact inside, and npm's uplot, unchanged. Scripts are compressed.
HTM := 3.1.1
UPLOT := 1.6.32
CONSOLE := tokenauth/web/pages/console
console-libraries:
	npm pack --silent htm@$(HTM) uplot@$(UPLOT)
	mkdir htm uplot
	tar xzf htm-$(HTM).tgz -C htm
	tar xzf uplot-$(UPLOT).tgz -C uplot
	gzip -9nc htm/package/preact/standalone.module.js > $(CONSOLE)/preact.js.gz
	gzip -9nc uplot/package/dist/uPlot.esm.js > $(CONSOLE)/uplot.js.gz
	cp uplot/package/dist/uPlot.min.css $(CONSOLE)/uplot.css
	cp htm/package/LICENSE $(CONSOLE)/LICENSE.htm
	cp uplot/package/LICENSE $(CONSOLE)/LICENSE.uplot
	rm -r htm htm-$(HTM).tgz uplot uplot-$(UPLOT).tgz

clean:
	rm -rf .venv .venv-3.* dist
