#!/usr/bin/env bash
# Attacks on the photographs for three seeds (of weights and initial images), for docs/results.md.
# Results go to FOLDER, tables to the screen.
#   [PYTHON=...] benchmarks/baseline.sh FOLDER
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

capture() { # arch seed flags...
  local arch=$1 seed=$2
  shift 2
  $python training.py --id "s$seed" --seed "$seed" --data-name photos --arch "$arch" \
    --image-size 32 --results "$out" "$@" >/dev/null
}
attack() { # id checkpoint seed flags...
  local id=$1 file=$2 seed=$3
  shift 3
  $python run.py --id "$id" --root "$out" --checkpoint "$out/$file-checkpoint.pth.tar" \
    --seed "$seed" --grad-sign --input-boxed --min-grads-loss --metric --no-controls "$@" | grep -E '^\| +mean '
}

for seed in 0 1 2; do
  capture lenet $seed -b 8 --outlayer-state keep
  capture convnet $seed -b 8 --outlayer-state keep --upload-bn
  capture resnet18 $seed -b 4 --upload-bn
  attack demo-$seed ids${seed}_lenet_random_photos_b8_i0 $seed --epochs 3000 --lr 0.05 --TV 1e-4 --TV-end 1e-6
  for grad in exact detached; do
    attack convnet-$grad-$seed ids${seed}_convnet_random_photos_b8_i0 $seed \
      --epochs 1000 --lr 0.1 --TV 1e-2 --BN 1e-2 --exact-bn --bn-grad $grad
    attack resnet18-$grad-$seed ids${seed}_resnet18_random_photos_b4_i0 $seed \
      --epochs 400 --lr 0.1 --TV 1e-2 --BN 1e-3 --exact-bn --bn-grad $grad
  done
done
