#!/usr/bin/env bash
# VPT's base-to-new table: ViT-B/16, 16 shots, L and epochs by dataset. Which posterior the paper's table has is not said;
# each run also trains its deterministic base (CoOp, CoCoOp-like). Settings: seeds.sh, and POSTERIORS="global image".
source "$(dirname "$0")/seeds.sh"
datasets="imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"

base_to_new() {
    for posterior in ${POSTERIORS:-global image}; do
        for dataset in $datasets; do
            finished "vpt-base-to-new/$posterior-$dataset-seed$1" && continue
            python vpt.py --dataset "$dataset" --classes base --shots 16 --seed "$1" --paper --compare \
                --posterior "$posterior"
        done
    done
}
side_by_side base_to_new
