#!/usr/bin/env bash
# Compares best, mean and MLCO on the photographs, with equally many iterations in all, for three
# seeds and for a network without and one with BatchNorm. docs/results.md has the tables.
#   [PYTHON=...] benchmarks/strategies.sh FOLDER
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

# Four seeds: 4 * steps iterations for best and mean; MLCO's 4 * 0.6 E + 0.4 E are as many.
compare() { # arch seed steps E T_in flags...
  local arch=$1 seed=$2 steps=$3 long=$4 inner=$5
  shift 5
  local file="$out/ids${seed}_${arch}_random_photos_b8_i0-checkpoint.pth.tar"
  local common="--root $out --checkpoint $file --seed $((10 * seed)) --n-seed 4 --grad-sign
    --input-boxed --min-grads-loss --metric --no-controls"
  for strategy in best mean; do
    $python run.py --id "$arch-$strategy-$seed" $common --strategy $strategy --epochs "$steps" "$@"
  done
  if [ "$arch" = lenet ]; then
    $python run.py --id "$arch-mlco-noise0-group1e-6-$seed" $common --strategy mlco \
      --epochs "$long" --T-in "$inner" --input-noise 0 --Group 1e-6 "$@"
  fi
  for noise in 0.2 0; do
    $python run.py --id "$arch-mlco-noise$noise-$seed" $common --strategy mlco --epochs "$long" \
      --T-in "$inner" --input-noise $noise "$@"
  done
}

for seed in 0 1 2; do
  for arch in lenet convnet; do
    $python training.py --id "s$seed" --seed "$seed" --data-name photos --arch $arch \
      --image-size 32 --results "$out" -b 8 --outlayer-state keep \
      $([ $arch = convnet ] && echo --upload-bn)
  done
  compare lenet "$seed" 1050 1500 150 --lr 0.05 --TV 1e-4 --TV-end 1e-6
  compare convnet "$seed" 700 1000 100 --lr 0.1 --TV 1e-2 --BN 1e-2 --exact-bn
done
