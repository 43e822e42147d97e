# Everything runs in .venv, which is made from requirements.lock: exact versions, with hashes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install serve test check bench faults lock swagger-ui wheel clean

install: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

serve: install
	$(BIN)/tokenauth serve --config config.toml

test: install
	$(BIN)/pytest -m "not faults" -n 3 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m bench

faults: install
	$(BIN)/pytest -m faults

wheel: install
	$(BIN)/python -m hatchling build -t wheel

lock:
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --generate-hashes --extra dev \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file requirements.lock pyproject.toml

# The page at /docs: two files of npm's swagger-ui-dist, as they are, compressed.
SWAGGER_UI := 5.35.0
swagger-ui:
	npm pack --silent swagger-ui-dist@$(SWAGGER_UI)
	tar xzf swagger-ui-dist-$(SWAGGER_UI).tgz
	for file in swagger-ui-bundle.js swagger-ui.css; do gzip -9nc package/$$file > tokenauth/pages/$$file.gz; done
	cp package/LICENSE tokenauth/pages/LICENSE.swagger-ui
	{ cat package/NOTICE; echo; cat package/swagger-ui-bundle.js.LICENSE.txt; } > tokenauth/pages/NOTICE.swagger-ui
	rm -r package swagger-ui-dist-$(SWAGGER_UI).tgz

clean:
	rm -rf .venv dist
