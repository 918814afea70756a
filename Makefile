# The two commands are `make demo` and `make test`; each does all the set-up it needs.
.DEFAULT_GOAL := help
BIN := .venv/bin

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv: the pinned requirements and this package
	@sh scripts/install requirements.txt

install-dev: ## the same, with what the checks and the tests need
	@sh scripts/install requirements-dev.txt

demo: install ## the whole stack on this machine with a simulated fleet
	@$(BIN)/sensor-pipeline up $(ARGS)

lint: install-dev ## format, lint, types and the Dockerfile, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

test: lint ## lint, the definitions, and every test against a real Kafka and a real PostgreSQL
	$(BIN)/dagster definitions validate
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: install-dev ## the random tests, for long: many more histories, kills and messages than `make test` tries
	SOAK=1 $(BIN)/pytest -m soak -s $(ARGS)

docker: install-dev ## build the image, and try the compose file with all that it promises (needs Docker)
	$(BIN)/pytest -m docker $(ARGS)

requirements: install-dev ## pin the direct dependencies of pyproject.toml anew (needs uv)
	uv pip compile $(COMPILE) --upgrade --all-extras pyproject.toml -o requirements-dev.txt
	uv pip compile $(COMPILE) --extra embedded --extra build -c requirements-dev.txt pyproject.toml -o requirements.txt
	uv pip compile $(COMPILE) --extra celery --extra build -c requirements-dev.txt pyproject.toml -o requirements-deploy.txt

COMPILE := --quiet --universal --generate-hashes --no-header --no-emit-index-url \
	--index-strategy unsafe-best-match --python-version 3.11

.PHONY: help install install-dev demo lint test soak docker requirements
