#!/usr/bin/env bash
# Prints the papers' runs, one command a line:  bash benchmark/papers.sh METHOD PROTOCOL [DATA_ROOT]
#   bash benchmark/papers.sh prograd few-shot /data | xargs -P 4 -I{} sh -c '{}'
#   prograd: few-shot base-to-new cross-dataset domain-generalisation
#   vpt: base-to-new cross-dataset domain-generalisation      proreg: id-ood
set -euo pipefail
method=${1:?METHOD: prograd, vpt or proreg} protocol=${2:?PROTOCOL, see the head of this file}
root=${3:-data}
few="caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
shift_sets="imagenetv2 imagenet_sketch imagenet_a imagenet_r"
call() {  # NAME FLAGS...: a run that goes on where it was, in a folder of its own
  echo "python $method.py --data-root $root --paper --resume runs/$protocol/$method-$1 ${*:2}"
}
for seed in 1 2 3; do
  case "$method $protocol" in
  "prograd few-shot")
    for set in imagenet $few; do for k in 1 2 4 8 16; do
      call "$set-$k-$seed" --dataset "$set" --shots "$k" --seed "$seed" --compare
    done; done ;;
  "prograd base-to-new")
    for set in imagenet $few; do
      epochs=100; [ "$set" = imagenet ] && epochs=50
      call "$set-$seed" --dataset "$set" --classes base --shots 4 --epochs $epochs --seed "$seed" --compare
    done ;;
  "vpt base-to-new")
    for set in imagenet $few; do
      call "$set-$seed" --dataset "$set" --classes base --shots 16 --seed "$seed" --compare
    done ;;
  "prograd cross-dataset" | "vpt cross-dataset")
    k=4; [ "$method" = vpt ] && k=16
    call "imagenet-$seed" --dataset imagenet --shots $k --seed "$seed" --test-on "$few" ;;
  "prograd domain-generalisation" | "vpt domain-generalisation")
    k=4; [ "$method" = vpt ] && k=16
    call "imagenet-$seed" --dataset imagenet --shots $k --seed "$seed" --test-on "$shift_sets" ;;
  "proreg id-ood")
    for loss in ce kd proreg; do
      for set in bar nico_animal nico_vehicle domainnet; do
        call "$set-$loss-$seed" --dataset "$set" --loss $loss --seed "$seed"
      done
      for domain in art_painting cartoon photo sketch; do
        call "pacs-$domain-$loss-$seed" --dataset pacs --test-domain $domain --loss $loss --seed "$seed"
      done
    done ;;
  *) echo "error: no protocol '$protocol' of '$method': see the head of $0" >&2; exit 2 ;;
  esac
done
