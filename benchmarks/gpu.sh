#!/usr/bin/env bash
# All that needs a GPU: tests/test_gpu.py, then every section of benchmarks/gpu.py, in 24 minutes at
# most. Rows go to FOLDER/gpu_SECTION.csv. A part that fails is told, and the rest goes on; the exit
# code is then 1.
#   [PYTHON=...] [SMOKE=--smoke] benchmarks/gpu.sh FOLDER [PART...]
set -uo pipefail
out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# Seconds that each part may take; its last 20 begin nothing new.
declare -A seconds=([tests]=240 [peaks]=60 [loop]=120 [signs]=60 [precision]=240 [step]=480 [seeds]=150 [layerwise]=90)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests peaks loop signs step precision seeds layerwise)
mkdir -p "$out"
failed=()

for part in "${parts[@]}"; do
  limit=${seconds[$part]:-}
  [ -n "$limit" ] || { echo "no part $part; there are ${!seconds[*]}" >&2; exit 2; }
  echo "== $part, at most $limit s" >&2
  if [ "$part" = tests ]; then
    timeout -k 10 "$limit" "$python" -m pytest -q tests/test_gpu.py
  else
    timeout -k 10 "$limit" "$python" -m benchmarks.gpu --section "$part" --out "$out" \
      --seconds $((limit - 20)) ${SMOKE:-}
  fi
  code=$?
  [ $code -eq 0 ] || { failed+=("$part"); echo "== $part failed, exit code $code" >&2; }
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
