#!/usr/bin/env bash
# Measure what the README beside this file reports: bash experiments/throughput/run.sh [FOLDER]
# Takes about five minutes on 2 CPU cores; nothing else should run on them.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-experiments/throughput}"
memjax="${MEMJAX:-.venv/bin/memjax}"

for variant in transformer linear delta delta_square; do
  "$memjax" bench --config="configs/bench.py:$variant" --seconds=12 --json | tail -n 1 > "$out/$variant.json"
done
"$memjax" bench --config=configs/bench.py:delta --seconds=2 --positions=1000,50000 --json \
  --config.model.layers=scan --depths=4,24 | tail -n 1 > "$out/delta_scan.json"
"$memjax" bench --config=configs/bench.py:transformer --seconds=2 --lengths=1024,2048,4096 --json \
  --config.model.mixers.attention.context=4096 --config.model.repeat=2 | tail -n 1 > "$out/lengths.json"
