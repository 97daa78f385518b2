# For a fresh machine with Python 3.10 or later: `make answer`, `make demo` and `make test`.
PYTHON ?= python3
PY := .venv/bin/python
DEMO := Dataset/demo

.PHONY: answer demo test
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -r requirements.txt
	touch $@

answer: .venv/ready
	$(PY) evaluation/evaluate.py --scan Dataset/example/painted_T1w.nii.gz Dataset/example/head_T1w.nii.gz

demo: .venv/ready
	$(PY) preprocessing/demo_cohort.py --raw $(DEMO)/raw
	$(PY) preprocessing/preprocess_oasis.py --raw $(DEMO)/raw --processed $(DEMO)/processed
	$(PY) training/train.py --data $(DEMO)/processed --run runs/demo-cae --model cae --steps 350
	$(PY) training/train.py --data $(DEMO)/processed --run runs/demo-dae --model dae --steps 550
	$(PY) evaluation/evaluate.py --run runs/demo-cae --data $(DEMO)/processed/test
	$(PY) evaluation/evaluate.py --run runs/demo-dae --data $(DEMO)/processed/test --maps
	$(PY) evaluation/compare.py runs/demo-cae/evaluation runs/demo-dae/evaluation
	@echo "Simulated scans. Reports: runs/demo-dae/evaluation/report.html and runs/demo-cae/evaluation/report.html"

test: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m pytest
