# make demo | test | lab need nothing but Python 3.11-3.13, git and make: they set up .venv themselves.
PY  = .venv/bin/python
NEW = .venv/.installed

help:
	@echo "make demo    invert, tune and edit the sample images; results in out/demo"
	@echo "make lab     open the notebooks in JupyterLab"
	@echo "make test    repository contracts, tests, every notebook once"
	@echo "make export  notebooks -> cycle_nb/, and clean the notebooks"
	@echo "make readme  nbs/index.ipynb -> README.md"
	@echo "make wheel   a wheel with the weights, in dist/"

demo: $(NEW)
	.venv/bin/cycle-nb demo --out out/demo

lab: $(NEW)
	.venv/bin/jupyter lab --notebook-dir=nbs

test: $(NEW)
	$(PY) -m pytest tests -q -p no:cacheprovider --durations=15 --timeout=900 $(ARGS)

export: $(NEW)
	.venv/bin/nbdev-export
	.venv/bin/nbdev-clean

readme: $(NEW)
	$(PY) tools/nb.py readme

wheel: $(NEW)
	$(PY) -m build --wheel

setup: $(NEW)

# Installed again whenever what is required changes.
$(NEW): settings.ini setup.py tools/venv.sh
	sh tools/venv.sh
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info out .pytest_cache

.PHONY: help demo lab test export readme wheel setup clean
