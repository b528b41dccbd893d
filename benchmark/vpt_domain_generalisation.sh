#!/usr/bin/env bash
# VPT's domain generalisation table: ViT-B/16 trained on ImageNet with 16 shots, tested on its four variants. Settings:
# seeds.sh, and POSTERIORS="global image": the image posterior encodes L x 1,000 prompts for each of 50,000 test images, so
# it is not in the default.
source "$(dirname "$0")/seeds.sh"
targets="imagenetv2 imagenet_sketch imagenet_a imagenet_r"

domain_generalisation() {
    for posterior in ${POSTERIORS:-global}; do
        finished "vpt-domain-generalisation/$posterior-seed$1" && continue
        python vpt.py --dataset imagenet --shots 16 --seed "$1" --paper --compare \
            --posterior "$posterior" --test-on $targets
    done
}
side_by_side domain_generalisation
