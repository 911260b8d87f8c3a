# Everything runs in .venv, which each command makes for itself.
PYTHON ?= python3
py := .venv/bin/python
rounds ?= 50
jobs ?= 2

.PHONY: demo demo-seeds report test lint drill gpu clean

demo: .venv/done
	$(py) prepare_data.py --dataset=python --tokenizer=bpe2048
	for residual in baseline hc mhc; do \
	  $(py) train.py config/demo.py --residual=$$residual --out_dir=out/demo/$$residual --init_from=scratch || exit 1; \
	done
	$(py) figures.py out/demo/baseline out/demo/hc out/demo/mhc --out=out/demo/report.png

# Five seeds of the demo, through experiments.py: rows in results/rates.csv; then the report, and README's picture.
demo-seeds: .venv/done
	$(py) prepare_data.py --dataset=python --tokenizer=bpe2048
	$(py) experiments.py demo --jobs=$(jobs)
	$(py) tools/report.py

# REPORT.md and its pictures from results/*.csv; nothing is trained.
report: .venv/done
	$(py) tools/report.py

# Two processes of one thread each: a file's tests stay together, for what they share.
test: .venv/done
	OMP_NUM_THREADS=1 $(py) -m pytest -q -n $(jobs) --dist loadfile tests

lint: .venv/done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

drill: .venv/done
	$(py) tools/drill.py --rounds=$(rounds)

# On a machine with a GPU, under its own python3 with its own torch and Triton: nine minutes; the numbers go to gpu.json.
gpu:
	$(PYTHON) tools/gpu_hour.py

# Remade when requirements.txt changes.
.venv/done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(py) -m pip install -r requirements.txt
	touch $@

# Caches alone: runs and corpora are yours to remove.
clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
