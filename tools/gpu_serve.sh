#!/usr/bin/env bash
# Serves a model of random weights on the GPU, loads it over HTTP, writes a table.
# usage: tools/gpu_serve.sh HEDDLE MODEL_DIR OUT_DIR
set -euo pipefail
heddle=$1 model=$2 out=$3
port=${HEDDLE_PORT:-8017}
cd "$(dirname "$0")/.."
"$heddle" serve "$model" --device cuda --load-format dummy --port "$port" >"$out/heddle.log" 2>&1 &
server=$!
trap 'kill -TERM "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true' EXIT
for ((i = 0; i < 600; i++)); do
  curl -sf -o /dev/null --max-time 2 "http://127.0.0.1:$port/health" && break
  kill -0 "$server" 2>/dev/null || { tail -20 "$out/heddle.log"; exit 1; }
  sleep 1
done
python3 bench/load.py --port "$port" --vocab 128000 --prompt 512 --output 128 --clients 1,16,64 --csv | tee "$out/serve.csv"
{
  echo "| serving, random weights, prompt 512, output 128 |"
  echo "| --- |"
  sed 's/^/| /; s/$/ |/' "$out/serve.csv"
} >"$out/serve.md"
