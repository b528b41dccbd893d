#!/usr/bin/env bash
# ProGrad's cross-dataset table: trained on ImageNet, tested on the ten other datasets. Settings: seeds.sh.
# How many shots the paper used was not seen: 4 is what it uses for its other transfer tables.
source "$(dirname "$0")/seeds.sh"
targets="caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"

cross_dataset() {
    finished "prograd-cross-dataset/seed$1" && return
    python prograd.py --dataset imagenet --shots 4 --seed "$1" --test-on $targets --paper --compare
}
side_by_side cross_dataset
