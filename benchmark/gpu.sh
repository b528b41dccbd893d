#!/usr/bin/env bash
# All GPU checks in one go, without network: bash benchmark/gpu.sh OUT [WHEELS] [cuda|cpu]
# WHEELS: a folder of wheels that the machine lacks. With cpu: small sizes, to try the script.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1 wheels=${2:-} device=${3:-cuda} failed=0; mkdir -p "$out"
[ -z "$wheels" ] || pip install -q --no-index --find-links "$wheels" -r requirements.txt
[ "$device" = cpu ] && quick=--quick || nvidia-smi >"$out/device.txt"
GPU_TEST_DEVICE=$device timeout 240 python -m pytest -m gpu 2>&1 | tee "$out/tests.txt" || failed=1
for precision in fp32 bf16; do
  timeout 120 python benchmark/speed.py --device "$device" --precision $precision ${quick:-} \
    --out "$out/speed-$precision.json" || failed=1
done
exit $failed
