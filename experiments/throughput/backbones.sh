#!/usr/bin/env bash
# Measure what backbones.md beside this file reports: bash experiments/throughput/backbones.sh [VARIANT...]
# Takes about half an hour on 2 CPU cores; nothing else should run on them. What is there already is
# not measured again: remove experiments/throughput/backbones to begin anew. Writes the tables of
# backbones.md at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=experiments/throughput/backbones
memjax="${MEMJAX:-.venv/bin/memjax}"
python="${PYTHON:-.venv/bin/python}"
mkdir -p "$out"

variants=(mamba2 mamba rg_lru mlstm ttt_linear titans_mac mom samba griffin gdn_h1 mamba2_attention
  linear_transformer based retnet gla deltanet hgrn2 ttt_mlp titans_lmm titans_mag titans_mal)
if [ $# -gt 0 ]; then variants=("$@"); fi
for variant in "${variants[@]}"; do
  if [ -s "$out/$variant.json" ]; then continue; fi
  echo "bench $variant"
  $memjax bench --config="configs/bench.py:$variant" --seconds=8 --json | tail -n 1 > "$out/new"
  mv "$out/new" "$out/$variant.json"
done
if [ ! -s "$out/selective_scan.json" ]; then
  $python experiments/throughput/selective_scan.py --json="$out/selective_scan.json"
fi
$python experiments/throughput/growth.py --json="$out/growth.json"
$python experiments/throughput/tables.py
