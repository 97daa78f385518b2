#!/usr/bin/env bash
# What one NVIDIA GPU does, in under ten minutes: speed and profile of a step, three trainings, an evaluation, memory,
# one process with NCCL. Run it from the repository's folder, in its environment, on an idle machine:
#
#   benchmarks/gpu.sh OUT [SLICES …]
#
# OUT is a new folder, which keeps the trainings and the evaluation. Each SLICES is what preprocess_oasis.py wrote of a
# scanner, with train/normal and val/normal, the first also with test; without any the demo's simulated scans are made.
# STEPS, of each training, is 12000 where it is not set. JSON comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
steps=${STEPS:-12000}
out=${1:?give a new folder to write to}
shift
mkdir "$out"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

if ! $python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "torch sees no CUDA device" >&2
    exit 1
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader

slices=("$@")
if [ ${#slices[@]} = 0 ]; then
    $python preprocessing/demo_cohort.py --raw "$out/raw"
    $python preprocessing/preprocess_oasis.py --raw "$out/raw" --processed "$out/processed" --quiet
    slices=("$out/processed")
fi

echo "== a step: against the plain loop, and what it goes to"
$python benchmarks/speed.py --models dae --rounds 3 --steps 50 | tee "$out/speed.txt"

for seed in 0 1 2; do
    echo "== training of $steps steps, seed $seed"
    nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader,nounits -lms 500 > "$out/gpu$seed.csv" &
    watch=$!
    began=$(date +%s.%N)
    $python training/train.py --data "${slices[@]}" --run "$out/run$seed" --steps "$steps" --seed "$seed" --device cuda
    echo "$began $(date +%s.%N)" > "$out/time$seed.txt"
    kill $watch
done

echo "== a training of one process with NCCL, 500 steps"
began=$(date +%s.%N)
$python -m torch.distributed.run --nproc_per_node 1 -- training/train.py --data "${slices[@]}" --run "$out/nccl" --steps 500 --device cuda
echo "$began $(date +%s.%N)" > "$out/timenccl.txt"

echo "== evaluation"
began=$(date +%s.%N)
$python evaluation/evaluate.py --run "$out/run0" --data "${slices[0]}/test" --out "$out/evaluation" --device cuda --quiet
echo "$began $(date +%s.%N)" > "$out/timeevaluation.txt"

$python - "$out" "$steps" <<'PYTHON'
import csv, json, sys
from pathlib import Path

import torch

out, steps = Path(sys.argv[1]), int(sys.argv[2])


def seconds(name):
    began, ended = map(float, (out / f"time{name}.txt").read_text().split())
    return round(ended - began, 1)


def read(name):
    with open(out / f"run{name}" / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


step = json.loads((out / "speed.txt").read_text().splitlines()[-1])
rates = [sorted(float(row["slices_per_s"]) for row in read(seed)) for seed in range(3)]
lines = (out / "gpu0.csv").read_text().splitlines()
used = [[float(part) for part in line.split(",")] for line in lines if "," in line]
with open(out / "evaluation" / "scans.csv", newline="") as file:
    scans = len(list(csv.DictReader(file)))
print(json.dumps({
    "gpu": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "steps": steps,
    "training_s": [seconds(seed) for seed in range(3)],
    "slices_per_s": [values[len(values) // 2] for values in rates],
    "validation_loss": [min(float(row["val_loss"]) for row in read(seed)) for seed in range(3)],
    "matrix_share": step["matrix_share"],
    "step_ms": {key[5:-3]: value for key, value in step.items() if key.startswith("step_")},
    "memory_mb": max(row[0] for row in used),
    "gpu_busy": round(sum(row[1] for row in used) / len(used) / 100, 2),
    "nccl_500_steps_s": seconds("nccl"),
    "evaluation_s": seconds("evaluation"),
    "evaluation_scans": scans,
}))
PYTHON
