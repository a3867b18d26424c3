#!/usr/bin/env bash
# Everything that only a GPU can prove: ./dev gpu [--quick] [--emulated] [--resume] [STEP ...]
# Each step is a process of its own with its own time limit, and none ends the others; without names
# all run in order. --resume leaves out those that have passed. Where nothing can be compiled, a
# bundle made elsewhere is used: ./dev bundle --gpu, build/bundle or build/heddle-bundle.tar.xz.
#   device build ops int4 attention sample moe steps worker   the tests of the backend, natively
#   memcheck racecheck synccheck                         compute-sanitizer on the small ones
#   nccl                                                 two ranks on this one card
#   bench                                                kernels against the limits of this very card
#   model-bf16 model-fp8 model-int4                      a random-weight Llama-3.1-8B in the worker: prompts,
#                                                        decode steps, time without a kernel between them
#   serve-bf16 serve-fp8 serve-int4                      the same model served, HTTP load
#   peer                                                 transformers on the same shape, where torch is
#   report                                               build/gpu/report.md from what the others left
# --emulated plays all of it on the CPU: it proves this script and measures nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
all=(device build ops int4 attention sample moe steps worker memcheck racecheck synccheck nccl bench
  model-bf16 model-fp8 model-int4 serve-bf16 serve-fp8 serve-int4 peer)
quick=false emulated=false resume=false chosen=()
for word in "$@"; do
  case $word in
    --quick) quick=true ;;
    --emulated) emulated=true ;;
    --resume) resume=true ;;
    report) chosen+=(report) ;;
    *) [[ " ${all[*]} " == *" $word "* ]] || { echo "gpu: no step '$word'; steps: ${all[*]} report" >&2; exit 2; }
       chosen+=("$word") ;;
  esac
done
build=build/${HEDDLE_GPU_PRESET:-release} out=${HEDDLE_GPU_OUT:-build/gpu} limit=${HEDDLE_GPU_STEP_SECONDS:-570}
mkdir -p "$out"
PATH="$PATH:/usr/local/cuda/bin"
unset HEDDLE_FAKE_GPU HEDDLE_CUDA_TRACE
compiles() { command -v cmake >/dev/null && command -v ninja >/dev/null && { $emulated || command -v nvcc >/dev/null; }; }
bundled=false
if [ -n "${HEDDLE_GPU_BUNDLE:-}" ] || ! compiles; then
  [ -e build/bundle/heddle ] || tar -C build -xf build/heddle-bundle.tar.xz 2>/dev/null
  [ -x build/bundle/tests/cuda/bench_steps ] && bundled=true build=build/bundle
fi
export HEDDLE_SOURCE_DIR=$PWD HEDDLE_BINARY_DIR=$build HEDDLE_PLUGIN_DIR=$PWD/$build
if $emulated; then export HEDDLE_PLUGIN_DIR=$PWD/build/${HEDDLE_GPU_PRESET:-release}/emulated HEDDLE_CUDA_QUICK=1; else export HEDDLE_GPU_NATIVE=1; fi

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
skip() { echo "left out: $*"; exit 77; }
native_test() { "$build/tests/cuda/test_cuda_$1"; }

step_device() {
  if $emulated; then echo "emulated device, no GPU"; return; fi
  command -v nvidia-smi >/dev/null || { echo "no nvidia-smi: this machine has no NVIDIA driver"; return 1; }
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit,memory.total --format=csv
}
step_build() {
  if $bundled; then
    "$build/heddle" --version && echo "a bundle made elsewhere: $build"
    return
  fi
  [ -f "$build/build.ninja" ] || cmake --preset "$(basename "$build")" >/dev/null || return
  if ! $emulated; then command -v nvcc >/dev/null || { echo "no nvcc: the plugin cannot be built here"; return 1; }; fi
  local targets=(heddle bench_cuda bench_steps test_cuda_{ops,int4,attention,sample,moe,steps,worker,nccl} heddle_cuda_emulated)
  if ! $emulated; then targets+=(heddle_cuda); fi
  ninja -C "$build" --quiet "${targets[@]}"
}
step_ops() { native_test ops; }
step_int4() { native_test int4; }
step_attention() { native_test attention; }
step_sample() { native_test sample; }
step_moe() { native_test moe; }
step_steps() { native_test steps; }
step_worker() { native_test worker; }
sanitizer() { # sanitizer TOOL: the small cases of every operation
  $emulated && skip "compute-sanitizer has no device to watch"
  command -v compute-sanitizer >/dev/null || skip "compute-sanitizer is not installed"
  local status=0 name
  for name in ops int4 moe sample attention; do
    HEDDLE_CUDA_QUICK=1 timeout $((limit / 5 - 3)) compute-sanitizer --tool "$1" --error-exitcode 9 "$build/tests/cuda/test_cuda_$name" || status=$?
  done
  return "$status"
}
step_memcheck() { sanitizer memcheck; }
step_racecheck() { sanitizer racecheck; }
step_synccheck() { sanitizer synccheck; }

# NCCL takes two ranks of one card for a mistake unless each says it is a host of its own; then they
# speak through sockets: right or wrong can be seen so, speed cannot. The tokens of two ranks are
# compared with those of one.
step_nccl() {
  if $emulated && ! $bundled; then native_test nccl || return; fi
  model_small || return
  local size rank
  for size in 1 2; do
    start "$build/heddle" coordinator "$out/tiny" --tp "$size" --port "$port" --worker-address "127.0.0.1:$((port + 1))"
    for ((rank = 0; rank < size; rank++)); do
      start env NCCL_HOSTID="card$rank" NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_MNNVL_ENABLE=0 \
        NCCL_NVLS_ENABLE=0 NCCL_CUMEM_ENABLE=0 "$build/heddle" worker "$out/tiny" --coordinator "127.0.0.1:$((port + 1))" \
        --rank "$rank" --tp "$size" --device cuda --device-index 0 --kv-cache-bytes 16MiB
    done
    serving_now && ask_tokens >"$out/nccl.$size" || { stop_all; return 1; }
    stop_all
  done
  cmp "$out/nccl.1" "$out/nccl.2" && cat "$out/nccl.2"
}
step_bench() {
  local words=()
  $quick && words+=(--quick)
  $emulated && words+=(--tiny)
  "$build/tests/cuda/bench_cuda" "${words[@]}" | tee "$out/bench.csv"
}
model_small() { mkdir -p "$out/tiny" && cp tests/golden/llama_bf16/{config.json,model.safetensors} tests/golden/llama/tokenizer*.json "$out/tiny/"; }
# The folder of the model to measure, made where it is not there; emulated a tiny one.
model_large() {
  model=$out/llama-3.1-8b
  if $emulated; then
    model=$out/tiny
    model_small
  else
    [ -f "$model/config.json" ] || python3 bench/make_shape.py llama-3.1-8b "$model"
  fi
}
model_run() { # model_run NAME WORDS...
  local name=$1 words=() model
  shift
  $quick && words+=(--quick)
  $emulated && words+=(--tiny)
  model_large && "$build/tests/cuda/bench_steps" "$model" "${words[@]}" "$@" >"$out/model-$name.csv.new" &&
    mv "$out/model-$name.csv.new" "$out/model-$name.csv" && cat "$out/model-$name.csv"
}
step_model-bf16() { model_run bf16; }
step_model-fp8() { model_run fp8 --quantization fp8; }
step_model-int4() { model_run int4 --quantization int4; }
port=${HEDDLE_PORT:-8017}
started=()
start() {
  echo "$ $*" >>"$out/heddle.log"
  "$@" >>"$out/heddle.log" 2>&1 &
  started+=($!)
}
stop_all() {
  local pid i
  for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null; done
  for ((i = 0; i < 300; i++)); do
    kill -0 "${started[@]}" 2>/dev/null || break
    sleep 0.1
  done
  for pid in "${started[@]}"; do kill -KILL "$pid" 2>/dev/null; wait "$pid" 2>/dev/null; done
  started=()
}
serving_now() { # waits until requests are taken, as long as all that was started lives
  local pid i
  for ((i = 0; i < 400; i++)); do
    curl -sf -o /dev/null --max-time 2 "http://127.0.0.1:$port/health" && return 0
    for pid in "${started[@]}"; do kill -0 "$pid" 2>/dev/null || { tail -20 "$out/heddle.log"; return 1; }; done
    sleep 1
  done
  echo "not serving after $i s"
  return 1
}
ask_tokens() {
  curl -sf --max-time 60 "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
    -d '{"prompt":[5,9,30,17],"max_tokens":24,"temperature":0,"ignore_eos":true}' |
    python3 -c 'import json,sys; print(json.load(sys.stdin)["choices"][0]["text"])'
}
serving() { # serving NAME WORDS...
  local name=$1 model load=(--vocab 128000 --prompt 960 --output 128 --clients "1,16,64" --requests-each 2)
  shift
  model_large || return
  if $emulated; then
    load=(--vocab 400 --prompt 16 --output 8 --clients "1,2" --requests-each 1)
    set -- "$@" --kv-cache-bytes 16MiB
  else
    set -- --load-format dummy "$@"
  fi
  local status=1
  rm -f "$out/trace-$name.csv"
  start env HEDDLE_CUDA_TRACE="$out/trace-$name.csv" "$build/heddle" serve "$model" --device cuda --port "$port" "$@"
  serving_now && { python3 bench/load.py --port "$port" "${load[@]}" >"$out/serve-$name.csv"; status=$?; }
  stop_all
  [ "$status" = 0 ] && cat "$out/serve-$name.csv"
  return "$status"
}
step_serve-bf16() { serving bf16; }
step_serve-fp8() { serving fp8 --quantization fp8; }
step_serve-int4() { serving int4 --quantization int4; }
step_peer() {
  $emulated && skip "nothing is measured on the emulated device"
  python3 -c 'import torch, transformers; assert torch.cuda.is_available()' 2>/dev/null || skip "no PyTorch with CUDA and transformers"
  python3 tools/gpu_peer.py "$out/llama-3.1-8b" | tee "$out/peer.csv"
}

report() { # from the files that steps left, so that it is right after any of them
  {
    echo "# GPU suite"
    echo
    date -u +%FT%TZ
    git describe --always --dirty 2>/dev/null
    $emulated && echo && echo "Played by the emulated device: no figure here means anything."
    echo
    [ -f "$out/device.log" ] && sed 's/^/    /' "$out/device.log"
    echo
    echo "| step | result | seconds |"
    echo "| --- | --- | --- |"
    for name in "${all[@]}"; do [ -f "$out/$name.result" ] && echo "| $name | $(sed 's/ / | /' "$out/$name.result") |"; done
    python3 tools/gpu_table.py "$out" || echo "The table could not be made: see report.log."
  } >"$out/report.md" 2>>"$out/report.log"
}

run_step() { # in a process of its own, so that nothing of it stays behind
  say "$1"
  local begun=$SECONDS status=0 word
  set -- "$1" "$out/$1.log"
  (
    trap stop_all EXIT
    "step_$1"
  ) >"$2" 2>&1 &
  local child=$!
  ( sleep "$limit"; pkill -TERM -P "$child"; kill -TERM "$child" ) >/dev/null 2>&1 &
  local watch=$!
  wait "$child" || status=$?
  pkill -P "$watch" 2>/dev/null
  kill "$watch" 2>/dev/null
  wait "$watch" 2>/dev/null
  [ $((SECONDS - begun)) -ge "$limit" ] && status=143
  case $status in 0) word=passed ;; 77) word=skipped ;; 143) word="TIMEOUT" ;; *) word=FAILED ;; esac
  echo "$word $((SECONDS - begun))" >"$out/$1.result"
  case $word in FAILED | TIMEOUT) tail -5 "$2" >&2 ;; esac
  report
  [ "$word" = passed ] || [ "$word" = skipped ]
}

[ ${#chosen[@]} -gt 0 ] || chosen=("${all[@]}")
failed=0
for name in "${chosen[@]}"; do
  if $resume && grep -qE '^(passed|skipped)' "$out/$name.result" 2>/dev/null; then continue; fi
  [ "$name" = report ] || run_step "$name" || failed=1
done
report
cat "$out/report.md"
exit "$failed"
