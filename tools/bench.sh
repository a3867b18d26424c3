#!/usr/bin/env bash
# Benchmarks of the CPU backend: kernels, whole model, HTTP serving; against a peer where one is given.
# usage: tools/bench.sh [--peer DIR] [--shape NAME] [--rounds N] [--only kernels|model|serve]
# DIR holds llama-bench, llama-server and llama-quantize of a peer. Rounds of ours and theirs
# alternate; rows are appended to bench/results/*.csv with commit, machine and date.
set -euo pipefail
cd "$(dirname "$0")/.."
peer='' shape=qwen2.5-0.5b rounds=3 only=all
while [ $# -gt 0 ]; do
  case $1 in
  --peer) peer=$2 && shift 2 ;;
  --shape) shape=$2 && shift 2 ;;
  --rounds) rounds=$2 && shift 2 ;;
  --only) only=$2 && shift 2 ;;
  *) sed -n 2,6p "$0" >&2 && exit 2 ;;
  esac
done
bin=build/release
work=build/bench
mkdir -p "$work" bench/results
model=$work/$shape
[ -f "$model/config.json" ] || python3 bench/make_shape.py "$shape" "$model"
vocab=$(python3 -c "import json,sys; print(json.load(open(sys.argv[1]))['vocab_size'])" "$model/config.json")
commit=$(git rev-parse --short HEAD 2>/dev/null || echo none)
machine="$(nproc)x $(sed -n 's/^model name.*: //p;/^model name/q' /proc/cpuinfo | head -n 1)"
stamp() { sed "s|^|$(date -u +%F),$commit,$machine,|"; }
threads=$(nproc)

peer_version() { [ -f "$peer/VERSION" ] && cat "$peer/VERSION" || "$peer/llama-bench" --version 2>&1 | head -n 1 | tr ',' ' '; }
peer_model() { # peer_model FORMAT -> path of the GGUF, made once
  local file=$work/$shape-$1.gguf
  [ -f "$work/$shape-bf16.gguf" ] || python3 bench/make_shape.py "$shape" "$work/$shape-bf16.gguf" >&2
  [ -f "$file" ] || "$peer/llama-quantize" "$work/$shape-bf16.gguf" "$file" "$1" "$threads" >"$work/quantize.log" 2>&1
  echo "$file"
}
peer_args=()
[ -n "$peer" ] && "$peer/llama-bench" --help 2>&1 | grep -q -- '-rtr' && peer_args=(-rtr 1)

bench_model() {
  local ours=bench/results/model.csv pair format theirs round
  [ -f "$ours" ] || echo "date,commit,machine,engine,format,threads,prefill 512 tokens/s,decode tokens/s,bytes a step,decode GB/s,read GB/s,share of read" >"$ours"
  for pair in "bf16 none bf16" "int8 int8 q8_0" "int4 int4 q4_0"; do
    # shellcheck disable=SC2086
    set -- $pair
    format=$1
    for ((round = 0; round < rounds; round++)); do
      "$bin/bench_model" "$model" quantization="$2" threads="$threads" kv=bf16 |
        awk -F, -v f="$format" -v OFS=, '{print "heddle " f, f, $3, $7, $8, $9, $10, $11, $12}' | stamp | tee -a "$ours"
      [ -n "$peer" ] || continue
      theirs=$(peer_model "$3")
      "$peer/llama-bench" -m "$theirs" -p 512 -n 64 -t "$threads" -r 2 "${peer_args[@]}" -o json 2>/dev/null |
        python3 -c "
import json, sys
rows = json.load(sys.stdin)
best = lambda key: max(max(r['samples_ts']) for r in rows if r[key])
print(f'{sys.argv[1]},{sys.argv[2]},{sys.argv[3]},{best(\"n_prompt\"):.1f},{best(\"n_gen\"):.2f},{rows[0][\"model_size\"]},,,')" \
          "$(peer_version)" "$3" "$threads" | stamp | tee -a "$ours"
    done
  done
}

wait_health() {
  local i
  for ((i = 0; i < 1200; i++)); do
    curl -sf -o /dev/null --max-time 2 "http://127.0.0.1:$1/health" && return 0
    sleep 0.1
  done
  echo "nothing healthy on port $1" >&2
  return 1
}

serve_once() { # serve_once TAG API PORT COMMAND…: load on a server that is started for it
  local tag=$1 api=$2 port=$3 server
  shift 3
  "$@" >"$work/server.log" 2>&1 &
  server=$!
  wait_health "$port" || { kill "$server"; tail -n 5 "$work/server.log" >&2; return 1; }
  python3 bench/load.py --port "$port" --api "$api" --vocab "$vocab" --clients 1,4,16 --tag "$tag" | tail -n +2 | stamp |
    tee -a bench/results/serve.csv
  kill "$server"
  wait "$server" 2>/dev/null || true
}

bench_serve() {
  local round port=8391
  [ -f bench/results/serve.csv ] || echo "date,commit,machine,engine,clients,requests,output tokens/s,TTFT p50 ms,TTFT p99 ms,ITL p50 ms,ITL p99 ms,fewest events" >bench/results/serve.csv
  for ((round = 0; round < rounds; round++)); do
    serve_once "heddle $shape int4" openai $port "$bin/heddle" serve "$model" --load-format dummy --quantization int4 \
      --port $port --threads "$threads" --max-num-seqs 16 --max-model-len 1024 --generation-config none
    [ -n "$peer" ] || continue
    serve_once "$(peer_version) $shape q4_0" llama $((port + 1)) "$peer/llama-server" -m "$(peer_model q4_0)" -t "$threads" -np 16 -c 8192 \
      --host 127.0.0.1 --port $((port + 1)) "${peer_args[@]:0:1}"
  done
}

[ "$only" = all ] || [ "$only" = kernels ] && [ -x "$bin/bench_kernels" ] && "$bin/bench_kernels"
if [ "$only" = all ] || [ "$only" = model ]; then bench_model; fi
if [ "$only" = all ] || [ "$only" = serve ]; then bench_serve; fi
