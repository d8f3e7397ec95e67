#!/usr/bin/env bash
# Does a search pay? Compares settings found on simulated images (other crops, other weights) with
# those of the demo, on three target batches.
#   [PYTHON=...] benchmarks/search.sh FOLDER
#   python -m benchmarks.collect FOLDER/results/exp/*
set -euo pipefail
folder=$(realpath -m "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
client() {
    "$python" training.py --data-name photos --image-size 32 --arch lenet --batch-size 8 \
        --outlayer-state keep --results "$folder" "$@" > /dev/null
}
client --id simulation --seed 1 --target-idx 7
for index in 0 1 2; do client --id target --target-idx "$index"; done
file() { echo "$folder/id$1_lenet_random_photos_b8_i$2-checkpoint.pth.tar"; }
attack() {
    "$python" run.py --root "$folder" --epochs 3000 --grad-sign --input-boxed --min-grads-loss \
        --TV-end 1e-6 --metric --no-controls "$@"
}
attack --id search --checkpoint "$(file target 0)" --superparameters-search --lr-tune --TV-tune \
    --simulation-checkpoint "$(file simulation 7)" --num-samples 16 --HP-epochs 3000 --min-t 750 \
    --max-t 3000 --max-concurrent 2 --search-alg optuna --verbose 0 --search-only
read -r lr tv < <("$python" -c "import json, sys; best = json.load(open(sys.argv[1]))['best']
print(best['lr'], best['tv'])" "$folder/results/search/search/search.json")
for index in 0 1 2; do
    attack --id "demo-$index" --checkpoint "$(file target "$index")" --lr 0.05 --TV 1e-4
    attack --id "found-$index" --checkpoint "$(file target "$index")" --lr "$lr" --TV "$tv"
done
