#!/usr/bin/env bash
# Benchmarks of the CPU backend: kernels, whole model, long context, a busy neighbour, HTTP serving;
# beside peers where they are given.
# usage: tools/bench.sh [--peer DIR]… [--library KIND:PYTHON:MODEL]… [--shape NAME] [--rounds N] [--formats "bf16 int8 int4"]
#                       [--only kernels|model|context|neighbour|serve]
# Each DIR holds llama-bench, llama-server and llama-quantize of a peer, and VERSION, a line that names
# it. A library (ctranslate2, openvino, vllm) is measured by bench/library_peer.py in its own Python.
# Rounds of ours and theirs alternate; rows are appended to bench/results/cpu-*.csv with commit,
# machine and date, and bench/ratios.py compares within rounds. BENCH_ROUND names the first round.
set -euo pipefail
cd "$(dirname "$0")/.."
peers=() libraries=() shape=qwen2.5-0.5b rounds=3 only=all formats="bf16 int8 int4"
while [ $# -gt 0 ]; do
  case $1 in
  --peer) peers+=("$2") && shift 2 ;;
  --library) libraries+=("$2") && shift 2 ;;
  --shape) shape=$2 && shift 2 ;;
  --rounds) rounds=$2 && shift 2 ;;
  --formats) formats=$2 && shift 2 ;;
  --only) only=$2 && shift 2 ;;
  *) sed -n 2,10p "$0" >&2 && exit 2 ;;
  esac
done
bin=build/release
work=build/bench
threads=$(nproc)
first_round=${BENCH_ROUND:-$(date -u +%H%M%S)}
mkdir -p "$work" bench/results
model=$work/$shape
[ -f "$model/config.json" ] || python3 bench/make_shape.py "$shape" "$model"
vocab=$(python3 -c "import json,sys; print(json.load(open(sys.argv[1]))['vocab_size'])" "$model/config.json")
commit=$(git rev-parse --short HEAD 2>/dev/null || echo none)
machine="${threads}x $(sed -n 's/^model name.*: //p;/^model name/q' /proc/cpuinfo | head -n 1)"
round=$first_round

record() { # record FILE: rows on standard input, each with its stamp, to the file and to the terminal
  sed "s|^|$(date -u +%F),$commit,$machine,$shape,$round,|" | tee -a "bench/results/$1"
}
columns() { # columns FILE NAMES: a header where the file is new
  [ -f "bench/results/$1" ] || echo "date,commit,machine,shape,round,$2" >"bench/results/$1"
}

# --- peers ---

peer_name() {
  if [ -f "$1/VERSION" ]; then cat "$1/VERSION"; else "$1/llama-bench" --version 2>&1 | head -n 1 | tr ',' ' '; fi
}
peer_model() { # peer_model DIR FORMAT: the path of the GGUF, made once for all peers
  local dir=$1 file=$work/$shape-$2.gguf
  [ -f "$work/$shape-bf16.gguf" ] || python3 bench/make_shape.py "$shape" "$work/$shape-bf16.gguf" >&2
  [ -f "$file" ] || "$dir/llama-quantize" "$work/$shape-bf16.gguf" "$file" "$2" "$threads" >"$work/quantize.log" 2>&1
  echo "$file"
}
# The switches that make a peer fastest, where it has them: weights repacked at load, huge pages.
bench_switches() {
  local help
  help=$("$1/llama-bench" --help 2>&1 || true)
  grep -q -- '-rtr' <<<"$help" && printf '%s\n' -rtr 1
  grep -q -- '-thp' <<<"$help" && printf '%s\n' -thp 1
  return 0
}
server_switches() {
  local help
  help=$("$1/llama-server" --help 2>&1 || true)
  grep -q -- '-rtr' <<<"$help" && printf '%s\n' -rtr
  grep -q -- '-thp' <<<"$help" && printf '%s\n' -thp
  grep -q -- '--cache-ram' <<<"$help" && printf '%s\n' --cache-ram 0
  return 0
}
their_format() {
  case $1 in bf16) echo bf16 ;; int8) echo q8_0 ;; *) echo q4_0 ;; esac
}

# --- one measurement ---

ours() { # ours CASE FORMAT SETTINGS…: a row of bench_model
  local case=$1 format=$2 quantization=$2
  shift 2
  local head=auto
  [ "$format" = bf16 ] && quantization=none
  [ "$format" = "int4 with head" ] && quantization=int4 head=int4
  "$bin/bench_model" "$model" quantization="$quantization" head="$head" threads="$threads" kv=bf16 "$@" 2>/dev/null |
    awk -F, -v c="$case" -v f="$format" -v OFS=, '{print c, "heddle", f, $3, $4, $7, $6, $8, $9, $10, $11, $12}' |
    record cpu-model.csv
}
theirs() { # theirs CASE DIR FORMAT SWITCHES…: the best of llama-bench's repetitions
  local case=$1 dir=$2 format=$3 file name switches
  shift 3
  file=$(peer_model "$dir" "$format")
  name=$(peer_name "$dir")
  mapfile -t switches < <(bench_switches "$dir")
  "$dir/llama-bench" -m "$file" -t "$threads" -r 2 "${switches[@]}" "$@" -o json 2>/dev/null | python3 bench/peer_row.py "$case" "$name" "$format" "$threads" |
    record cpu-model.csv
}

bench_model() {
  local format peer
  for format in $formats; do
    ours whole "$format"
    [ "$format" = int4 ] && ours whole "int4 with head" prompt=64
    for peer in "${peers[@]}"; do theirs whole "$peer" "$(their_format "$format")" -p 512 -n 64; done
  done
}

bench_context() {
  local format
  for format in $formats; do ours context "$format" context=16384 decode=32 prompt=64; done
}

# A process that never rests on the first core, while the rest is measured as always.
bench_neighbour() {
  local format peer burner
  for format in $formats; do
    for busy in quiet neighbour; do
      [ $busy = quiet ] || { taskset -c 0 sh -c 'while :; do :; done' & burner=$!; }
      ours "$busy" "$format"
      for peer in "${peers[@]}"; do theirs "$busy" "$peer" "$(their_format "$format")" -p 128 -n 16; done
      [ $busy = quiet ] || { kill "$burner"; wait "$burner" 2>/dev/null || true; }
    done
  done
}

# --- HTTP ---

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
  sleep 3 # ours moves its weights from the file's pages meanwhile
  python3 bench/load.py --port "$port" --api "$api" --vocab "$vocab" --clients "${BENCH_CLIENTS:-1,16}" --tag "$tag" --requests-each "${BENCH_REQUESTS:-3}" |
    tail -n +2 | record cpu-serve.csv
  kill "$server"
  wait "$server" 2>/dev/null || true
}

bench_serve() {
  local port=$((20000 + RANDOM % 20000)) peer switches packed=$work/$shape-int4
  [ -f "$packed/model.safetensors" ] || "$bin/heddle" quantize "$model" --load-format dummy --format int4 --out "$packed" >/dev/null
  serve_once "heddle int4" openai $port "$bin/heddle" serve "$packed" --port $port --threads "$threads" --max-num-seqs 16 \
    --max-model-len 1024 --generation-config none
  for peer in "${peers[@]}"; do
    port=$((port + 1))
    mapfile -t switches < <(server_switches "$peer")
    serve_once "$(peer_name "$peer") q4_0" llama $port "$peer/llama-server" -m "$(peer_model "$peer" q4_0)" -t "$threads" -np 16 -c 8192 \
      --host 127.0.0.1 --port $port "${switches[@]}"
  done
  local library kind python path
  for library in "${libraries[@]}"; do
    IFS=: read -r kind python path <<<"$library"
    "$python" bench/library_peer.py "$kind" "$path" --threads "$threads" 2>"$work/library.log" | grep ",16," | record cpu-serve.csv
  done
}

columns cpu-model.csv "case,engine,format,threads,prompt,prefill tokens/s,context,decode tokens/s,bytes a step,decode GB/s,read GB/s,share of read"
columns cpu-serve.csv "engine,clients,requests,output tokens/s,TTFT p50 ms,TTFT p99 ms,ITL p50 ms,ITL p99 ms,fewest events"
wants() { [ "$only" = all ] || [ "$only" = "$1" ]; }
if wants kernels && [ -x "$bin/bench_kernels" ]; then "$bin/bench_kernels"; fi
for ((r = 0; r < rounds; r++)); do
  round=$((10#$first_round + r))
  if wants model; then bench_model; fi
  if wants context; then bench_context; fi
  if wants neighbour; then bench_neighbour; fi
  if wants serve; then bench_serve; fi
done
