#!/usr/bin/env bash
# ProGrad's base-to-new table: RN50, 4 shots, 100 epochs (ImageNet 50), CoOp from the same start beside it. See seeds.sh.
source "$(dirname "$0")/seeds.sh"
datasets="imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"

base_to_new() {
    for dataset in $datasets; do
        finished "prograd-base-to-new/$dataset-seed$1" && continue
        python prograd.py --dataset "$dataset" --classes base --shots 4 --seed "$1" --paper --compare
    done
}
side_by_side base_to_new
