#!/usr/bin/env bash
# VPT's cross-dataset table: ViT-B/16 trained on ImageNet with 16 shots, tested on ten other datasets. Settings: seeds.sh,
# and POSTERIORS="global image": the image posterior encodes L x 1,000 prompts for each of 50,000 test images, so it is not
# in the default.
source "$(dirname "$0")/seeds.sh"
targets="caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"

cross_dataset() {
    for posterior in ${POSTERIORS:-global}; do
        finished "vpt-cross-dataset/$posterior-seed$1" && continue
        python vpt.py --dataset imagenet --shots 16 --seed "$1" --paper --compare \
            --posterior "$posterior" --test-on $targets
    done
}
side_by_side cross_dataset
