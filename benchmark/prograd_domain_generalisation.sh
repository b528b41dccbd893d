#!/usr/bin/env bash
# ProGrad's domain generalisation table: trained on ImageNet with 4 shots, tested on its four variants. Settings: seeds.sh.
source "$(dirname "$0")/seeds.sh"
targets="imagenetv2 imagenet_sketch imagenet_a imagenet_r"

domain_generalisation() {
    for model in RN50 ViT-B-16; do
        finished "prograd-domain-generalisation/$model-seed$1" && continue
        python prograd.py --dataset imagenet --shots 4 --seed "$1" --model $model --test-on $targets --paper --compare
    done
}
side_by_side domain_generalisation
