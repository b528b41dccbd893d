#!/usr/bin/env bash
# ProGrad's few-shot table: RN50, 11 datasets, 1 to 16 shots, CoOp from the same start beside it. Settings: seeds.sh.
source "$(dirname "$0")/seeds.sh"
datasets="imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"

few_shot() {
    for shots in 1 2 4 8 16; do
        for dataset in $datasets; do
            finished "prograd-few-shot/$dataset-${shots}shot-seed$1" && continue
            python prograd.py --dataset "$dataset" --shots "$shots" --seed "$1" --paper --compare
        done
    done
}
side_by_side few_shot
