#!/usr/bin/env bash
# Starts the demo model on two ranks, shows one streamed answer, stays until Ctrl-C.
# usage: tools/up.sh [--smoke] [options of heddle serve]; --smoke leaves after the answer.
set -euo pipefail
cd "$(dirname "$0")/.."
smoke=
[ "${1:-}" = --smoke ] && { smoke=1; shift; }
port=${HEDDLE_PORT:-8000}
url=http://127.0.0.1:$port
heddle=build/release/heddle

if curl -s -o /dev/null --max-time 1 "$url/live"; then
  echo "something answers at $url already; stop it, or set HEDDLE_PORT" >&2
  exit 1
fi
"$heddle" serve models/demo --tp 2 --port "$port" "$@" &
server=$!
stop() {
  trap - EXIT INT TERM
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
}
trap stop EXIT
trap 'stop; exit 0' INT TERM

for ((i = 0; i < 600; i++)); do
  curl -sf -o /dev/null --max-time 2 "$url/health" && break
  kill -0 "$server" 2>/dev/null || { wait "$server" || exit $?; exit 1; }
  sleep 0.1
done
curl -sf -o /dev/null --max-time 2 "$url/health" || { echo "not ready after a minute" >&2; exit 1; }

question="Tell me a story about a little rabbit."
printf '\n\033[1m> %s\033[0m\n' "$question"
"$heddle" chat --url "$url" --max-tokens 120 --stats -p "$question"
cat <<TXT

The API is at $url (the page to chat with is the same address). For example:

  curl -N $url/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages":[{"role":"user","content":"Once upon a time"}],"stream":true,"max_tokens":64}'

TXT
[ -n "$smoke" ] && exit 0
echo "Ctrl-C stops everything."
wait "$server"
