# make demo | test | lab need nothing but Python 3.11-3.13, git and make: they set up .venv themselves.
PY  = .venv/bin/python
NEW = .venv/.installed
JOBS = 2

help:
	@echo "make demo    invert, tune and edit the sample images; results in out/demo"
	@echo "make lab     open the notebooks in JupyterLab"
	@echo "make test    repository contracts, tests, every notebook once (JOBS=2 processes)"
	@echo "make torture kills, writes that fail, damaged files, a million names (hours; ARGS=--sample: a minute)"
	@echo "make matrix  tests of bars and widgets with the oldest and newest fastprogress and ipywidgets;"
	@echo "             ARGS='--wheel python3.13 voila' runs every notebook as a user has it, with only the wheel"
	@echo "make lint    unused names and the like (ruff)"
	@echo "make export  notebooks -> cycle_nb/, and clean the notebooks; the picture of the house"
	@echo "make readme  nbs/index.ipynb -> README.md"
	@echo "make vendor  the runtime of the live page (33 MB, once) into the cache; cycle-nb export-web needs it"
	@echo "make wheel   a wheel with the weights, in dist/; the same commit gives the same bytes"
	@echo "make world   train and measure again all that ships (hours; resumable)"
	@echo "make docs    the documentation site, in _docs/html (LIVE=folder adds a live page)"
	@echo "make slides  a deck for each part of the course, from the lessons' own figures, in _docs/slides"
	@echo "make teaching  students' versions of the assignments from the instructor's"
	@echo "make hosted  every notebook's badge and install cell, from settings.ini"

demo: $(NEW)
	.venv/bin/cycle-nb demo --out out/demo --overwrite

lab: $(NEW)
	.venv/bin/jupyter lab --notebook-dir=nbs

test: $(NEW)
	$(PY) -m pytest tests -q -p no:cacheprovider --durations=15 --timeout=900 -n $(JOBS) --dist loadgroup $(ARGS)

torture: $(NEW)
	$(PY) tests/torture.py $(ARGS)

matrix: $(NEW)
	$(PY) tools/matrix.py $(ARGS)

lint: $(NEW)
	$(PY) -m ruff check .

export: $(NEW)
	.venv/bin/nbdev-export
	.venv/bin/nbdev-clean
	$(PY) tools/make_docs.py --house

readme: $(NEW)
	$(PY) tools/nb.py readme

world: $(NEW)
	$(PY) tools/world.py $(ARGS)

vendor: $(NEW)
	$(PY) -c "from cycle_nb.export_web import fetch_runtime; print(fetch_runtime())"

wheel: $(NEW)
	rm -rf build
	$(PY) -m build --wheel

docs: .venv/.docs
	$(PY) tools/make_docs.py $(if $(LIVE),--live $(LIVE))

slides: .venv/.docs
	$(PY) tools/make_slides.py

teaching: .venv/.teach
	cd teaching && for s in source/*; do PATH="$(CURDIR)/.venv/bin:$$PATH" nbgrader generate_assignment $${s#source/} --create --force || exit 1; done

hosted: $(NEW)
	$(PY) tools/nb.py hosted

# Their packages come only with the first `make docs`, `make teaching`.
.venv/.docs .venv/.teach: .venv/.%: $(NEW)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@

.PHONY: docs slides teaching hosted

setup: $(NEW)

# Installed again whenever what is required changes.
$(NEW): settings.ini setup.py tools/venv.sh
	sh tools/venv.sh
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf build dist _docs _proc *.egg-info out .pytest_cache

.PHONY: help demo lab test torture matrix lint export readme world vendor wheel setup clean
