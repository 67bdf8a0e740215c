#!/usr/bin/env bash
# training/on_gpu.sh HOST MINUTES [PIPELINE [START]]: make train on a machine with a GPU that ssh reaches.
# Takes the committed code and the corpus there, trains both drafters in bf16 for so many minutes, from nothing or from the first
# drafter START, and brings them back into build/training. What was cut off goes on when the command is given again.
set -euo pipefail
if [[ $# -lt 2 || $# -gt 4 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
fi
host=$1 minutes=$2 pipeline=${3:-pipeline.yaml} start=${4:-}
cd "$(dirname "$0")/.."
[[ -x .venv/bin/python ]] || { echo "error: no .venv here, which reads the pipeline; make .venv/train.stamp makes it" >&2; exit 1; }
corpus=$(.venv/bin/python -c 'import sys; from pathlib import Path; from export.config import load
print(load(Path(sys.argv[1])).training.corpus)' "$pipeline")
{ git ls-files; echo "$corpus"; } | sort -u | tar -cz -T - | ssh "$host" 'mkdir -p d2sd && tar -xz -C d2sd'
ssh "$host" "cd d2sd && make train MINUTES=$minutes PIPELINE='$pipeline' START='$start'"
mkdir -p build/training
ssh "$host" 'tar -cz -C d2sd/build/training --exclude="state.*" --exclude=tensorboard dflash vp' | tar -xz -C build/training
echo "build/training/dflash and build/training/vp: trained and calibrated"
