#!/bin/sh
# Measures the table of docs/sweep.md: defences on lenet (matching) and on ResNet-18 (layerwise).
#   sh benchmarks/defences.sh [WORKERS] [FIRST BATCH]
# The table is of batches 0 to 2; settings of the attacks are chosen on batches from 10 on.
set -e
workers=${1:-2}
first=${2:-0}
python=${PYTHON:-python}
out=results/defences
$python training.py --id defences --results $out --data-name photos --image-size 32 -a lenet \
    -b 4 --target-idx "$first" --outlayer-state keep --with-control
$python run.py --id lenet --root $out --repeats 3 --sweep-workers "$workers" \
    --checkpoint "$out/iddefences_lenet_random_photos_b4_i$first-checkpoint.pth.tar" \
    --sweep defence=none,dp-sgd:1:0.01,dp-sgd:1:0.5,batch:1:1e-3,topk:0.1,random:0.1,percentile,int8,sign,local-steps:4,larger-batch:8 \
    --epochs 200 --lr 0.05 --TV 1e-4 --TV-end 1e-6 --sweep-TV 1e-4,1e-2 \
    --grad-sign --input-boxed --min-grads-loss
$python training.py --id defences --results $out --data-name photos --image-size 32 -a resnet18 \
    -b 4 --target-idx "$first" --outlayer-state keep --model-eval --with-control
$python run.py --id resnet18 --root $out --repeats 3 --sweep-workers "$workers" \
    --checkpoint "$out/iddefences_resnet18_random_photos_b4_i$first-checkpoint.pth.tar" \
    --sweep defence=none,dp-sgd:1:0.01,batch:1:1e-4,topk:0.1,random:0.1,int8,sign,groupnorm,local-steps:4 \
    --attack layerwise
