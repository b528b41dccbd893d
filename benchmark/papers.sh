#!/usr/bin/env bash
# Prints the papers' runs, one command a line:
#   bash benchmark/papers.sh METHOD PROTOCOL [DATA_ROOT] [-- FLAGS of every line...]
#     prograd: few-shot base-to-new cross-dataset domain-generalisation      proreg: id-ood
#     vpt: base-to-new cross-dataset domain-generalisation
#     coop (as published: λ = 0 from a random start): few-shot domain-generalisation
#   bash benchmark/papers.sh zero-shot [DATA_ROOT] [-- FLAGS...]    nothing is trained: run it first
# To run them (a line that is started again goes on where it was):
#   bash benchmark/papers.sh prograd few-shot /data -- --workers 4 > runs.txt
#   tr '\n' '\0' < runs.txt | xargs -0 -n 1 -P 4 sh -c                  four at a time
#   parallel -j 4 --lb --tagstring {#} < runs.txt                       a line's number before its log
#   parallel -j 4 --lb --tagstring {#} 'CUDA_VISIBLE_DEVICES=$(({%} - 1)) sh -c {}' < runs.txt
#   sbatch --array=1-165 --gpus=1 --wrap 'sed -n "${SLURM_ARRAY_TASK_ID}p" runs.txt | sh'
set -euo pipefail
method=${1:?METHOD: zero-shot, prograd, coop, vpt or proreg} protocol=zero-shot
[ "$method" = zero-shot ] || { protocol=${2:?PROTOCOL, see the head of this file}; shift; }
root=data; if [ $# -gt 1 ] && [ "$2" != -- ]; then root=$2; shift; fi
[ $# = 1 ] || [ "$2" = -- ] || { echo "error: $2: flags stand after --" >&2; exit 2; }
few="caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
shifts="imagenetv2 imagenet_sketch imagenet_a imagenet_r"
untrained="--shots 1 --epochs 0 --no-compare" compare=--compare k=16 script=$method mark="'\\''"
[ $method != prograd ] || k=4
[ $method != coop ] || compare="--lam 0 --init random"
[[ $method != coop && $method != zero-shot ]] || script=prograd
plain='[A-Za-z0-9_./-]+'  # else a word stands in '...', as sh reads it
quoted() { for word; do [[ $word =~ ^$plain$ ]] || word="'${word//\'/$mark}'"; echo -n " $word"; done; }
head="python $script.py --data-root$(quoted "$root") --paper --resume runs/$protocol/$method" more=$(quoted "${@:3}")
call() { echo "$head-$1 ${*:2}$more"; }  # NAME FLAGS...: a run in a folder of its own
for seed in 1 2 3; do
  case "$method $protocol" in
  "zero-shot zero-shot")
    for set in imagenet $few; do call $set --dataset $set $untrained; done
    call shifts --dataset imagenet $untrained --test-on $shifts
    for set in bar nico_animal nico_vehicle pacs domainnet; do call $set --dataset $set $untrained --model ViT-B-32
    done; break ;;
  "prograd few-shot" | "coop few-shot")
    for set in imagenet $few; do for k in 1 2 4 8 16; do
      call $set-$k-$seed --dataset $set --shots $k --seed $seed $compare
    done; done ;;
  "prograd base-to-new" | "vpt base-to-new")
    for set in imagenet $few; do
      call $set-$seed --dataset $set --classes base --shots $k --seed $seed $compare
    done ;;
  "prograd cross-dataset" | "vpt cross-dataset")
    call imagenet-$seed --dataset imagenet --shots $k --seed $seed --test-on $few ;;
  "prograd domain-generalisation" | "coop domain-generalisation" | "vpt domain-generalisation")
    call imagenet-$seed --dataset imagenet --shots $k --seed $seed ${compare#--compare} --test-on $shifts ;;
  "proreg id-ood")
    for loss in ce kd proreg; do for set in bar nico_animal nico_vehicle domainnet; do
      call $set-$loss-$seed --dataset $set --loss $loss --seed $seed
    done; for domain in art_painting cartoon photo sketch; do
      call pacs-$domain-$loss-$seed --dataset pacs --test-domain $domain --loss $loss --seed $seed
    done; done ;;
  *) echo "error: no protocol '$protocol' of '$method': see the head of $0" >&2; exit 2 ;;
  esac
done
