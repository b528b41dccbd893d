#!/usr/bin/env bash
# ProReg in- and out-of-distribution, ViT-B/32: ProReg with fine-tuning beside it, and KD at one weight; the ensemble and
# WiSE-FT from the same runs. PACS four times, each domain held out once. Settings: seeds.sh.
source "$(dirname "$0")/seeds.sh"
mixtures="--ensemble 0.1 0.5 0.9 --wise-ft 0.3 0.5 0.7"

id_ood() {
    for dataset in bar nico_animal nico_vehicle domainnet; do
        finished "proreg/$dataset-proreg-seed$1" ||
            python proreg.py --dataset $dataset --seed "$1" --paper --compare $mixtures
        finished "proreg/$dataset-kd-seed$1" ||
            python proreg.py --dataset $dataset --seed "$1" --paper --loss kd --no-compare
    done
    for domain in art_painting cartoon photo sketch; do
        finished "proreg/pacs-$domain-proreg-seed$1" ||
            python proreg.py --dataset pacs --test-domain $domain --seed "$1" --paper --compare $mixtures
        finished "proreg/pacs-$domain-kd-seed$1" ||
            python proreg.py --dataset pacs --test-domain $domain --seed "$1" --paper --loss kd --no-compare
    done
}
side_by_side id_ood
