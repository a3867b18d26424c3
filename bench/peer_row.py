#!/usr/bin/env python3
"""llama-bench's JSON on standard input -> the columns of bench/results/cpu-model.csv after the stamp.

usage: llama-bench … -o json | bench/peer_row.py CASE NAME FORMAT THREADS
"""
import json
import sys

case, name, form, threads = sys.argv[1:5]
rows = json.load(sys.stdin)


def best(key, other):
    speeds = [max(r["samples_ts"]) for r in rows if r.get(key) and not r.get(other)]
    return max(speeds) if speeds else 0


prompt = max([r["n_prompt"] for r in rows] + [0])
print(f"{case},{name},{form},{threads},{prompt},{best('n_prompt', 'n_gen'):.1f},,{best('n_gen', 'n_prompt'):.2f},{rows[0]['model_size']},,,")
