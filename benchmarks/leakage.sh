#!/usr/bin/env bash
# Attacks on the photographs for docs/results.md: how much leaks beyond the prior, which sample the
# gradient reveals most of, and how much a defence helps. They take about an hour on two cores.
# Attacks that are done already are not repeated.
#   [PYTHON=...] benchmarks/leakage.sh FOLDER [information|defences|controls]
#   python -m benchmarks.leakage FOLDER
set -euo pipefail
out=$(realpath -m "$1") part=${2:-all}
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

capture() { # id seed arch flags...
  local id=$1 seed=$2 arch=$3
  shift 3
  compgen -G "$out/id${id}_${arch}_*_i${index:-0}-checkpoint.pth.tar" >/dev/null && return
  $python training.py --id "$id" --seed "$seed" --data-name photos --arch "$arch" \
    --image-size 32 --results "$out" "$@" >/dev/null
}
attack() { # id checkpoint seed flags...
  local id=$1 file=$2 seed=$3
  shift 3
  [ ! -e "$out/results/exp/$id/done" ] || return 0 # result.json is there before the controls are
  rm -rf "$out/results/exp/$id"
  $python run.py --id "$id" --root "$out" --checkpoint "$out/id${file}-checkpoint.pth.tar" \
    --seed "$seed" --grad-sign --input-boxed --min-grads-loss --metric -p 1000000 "$@" >/dev/null
  touch "$out/results/exp/$id/done"
  echo "$id"
}
demo="--epochs 3000 --lr 0.05 --TV 1e-4 --TV-end 1e-6"
shorter="--epochs 1000 --lr 0.05 --TV 1e-4 --TV-end 1e-6" # with its controls: three attacks in one

# Gradient information ratio and PSNR of 64 crops in batches of eight, for five networks; in the
# batches of the last three no label comes twice.
information() {
  for seed in 0 1 2 3 4; do
    labels=$([ $seed -gt 1 ] && echo "--distinct-labels 8" || true)
    for index in 1 2 3 4 5 6 7 8; do
      capture "s$seed" $seed lenet -b 8 --outlayer-state keep --target-idx $index $labels
      attack information-$seed-$index "s${seed}_lenet_random_photos_b8_i$index" $seed \
        $demo --GInfoR --no-controls
    done
  done
  unset index
}

# Defences of the demo's client, against the demo's attack and one with a stronger prior.
defended() { # name seed flags...
  local name=$1 seed=$2
  shift 2
  capture "$name-$seed" $seed lenet -b 8 --outlayer-state keep --with-control "$@"
  attack "defence-$name-$seed" "$name-${seed}_lenet_random_photos_b8_i0" $seed $shorter
  attack "defence-$name-tv-$seed" "$name-${seed}_lenet_random_photos_b8_i0" $seed \
    --epochs 1000 --lr 0.05 --TV 1e-2 --TV-end 1e-3
}
defences() {
  for seed in 0 1 2; do
    defended none $seed
    for sigma in 0.0001 0.001 0.01; do
      defended sample-$sigma $seed --enable-dp --dp-mode per-sample -C 20 --sigma $sigma \
        --noise-seed $seed
    done
  done
  for seed in 0 1 2; do
    defended batch-clip $seed --enable-dp -C 0.5
    defended batch-noise $seed --enable-dp -C 0.5 --sigma 0.01
  done
}

# The gradient against one with nothing in it, for three networks.
controls() {
  for seed in 0 1 2; do
    capture none-$seed $seed lenet -b 8 --outlayer-state keep --with-control
    attack controls-lenet-shuffled-$seed none-${seed}_lenet_random_photos_b8_i0 $seed $shorter \
      --target-gradient shuffled
    capture control-$seed $seed convnet -b 8 --outlayer-state keep --upload-bn --with-control
    for gradient in true shuffled; do
      attack controls-convnet-$gradient-$seed control-${seed}_convnet_random_photos_b8_i0 $seed \
        --epochs 1000 --lr 0.1 --TV 1e-2 --BN 1e-2 --exact-bn --target-gradient $gradient
    done
    capture control-$seed $seed resnet18 -b 4 --upload-bn --with-control
    attack controls-resnet18-true-$seed control-${seed}_resnet18_random_photos_b4_i0 $seed \
      --epochs 400 --lr 0.1 --TV 1e-2 --BN 1e-3 --exact-bn
  done
}

if [ "$part" = all ]; then
  information
  defences
  controls
else
  "$part"
fi
