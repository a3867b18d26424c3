#!/usr/bin/env python3
"""What tools/gpu_suite.sh measured, as tables: kernels and serving, each against its bar and against the
limit measured on the same card. Bars are for one H100 and a Llama-3.1-8B; a row that was not measured
says so. usage: gpu_table.py DIR with bench.csv, model-*.csv,
serve-*.csv, trace-*.csv, peer.csv; the bars are left there as bars.csv too"""
import csv
import os
import sys

FOLDER = sys.argv[1]
NOMINAL = 3.35e12  # bytes a second of an H100


def rows(name):
    path = os.path.join(FOLDER, name)
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [r for r in csv.reader(f) if r]


def table(head, lines):
    if lines:
        print("\n| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
        for line in lines:
            print("| " + " | ".join(str(x) for x in line) + " |")


def bench():
    out = {}
    for r in rows("bench.csv")[1:]:
        if len(r) == 6:
            out[r[0], r[1]] = [float(x) for x in r[2:]]
    return out


def serving(name):
    """clients -> output tokens a second"""
    out = {}
    for r in rows("serve-%s.csv" % name):
        try:
            out[int(r[1])] = float(r[3])
        except (IndexError, ValueError):
            pass  # the header
    return out


def model(name):
    """(what, sequences) -> row of bench_steps, as numbers by column; the last such row counts"""
    lines = rows("model-%s.csv" % name)
    out = {}
    for r in lines[1:]:
        row = dict(zip(lines[0], r))
        try:
            out[row["what"], int(row["sequences"])] = {k: float(v) for k, v in row.items() if v and k not in ("what", "weights")}
        except (KeyError, ValueError):
            pass
    return out


def served_idle(name):
    """Median microseconds without a kernel before a decode step that follows another of as many
    sequences, of all that the server ran."""
    found, last = [], None
    for r in rows("trace-%s.csv" % name):
        try:
            tokens, seqs, idle = int(r[2]), int(r[3]), float(r[5])
        except (IndexError, ValueError):
            continue
        decode = (r[0], seqs) if tokens == seqs else None
        if decode and decode == last and idle >= 0:
            found.append(idle)
        last = decode
    return sorted(found)[len(found) // 2] if found else None


def verdict(value, floor, goal, form="%.2f", least=False):
    """least: smaller is better"""
    bar = "%s / %s" % (form % floor, form % goal)
    if value is None:
        return "not measured", bar, ""
    over = (lambda limit: value <= limit) if least else (lambda limit: value >= limit)
    return form % value, bar, "goal met" if over(goal) else "floor met" if over(floor) else "MISSED"


def ratio(a, b):
    return a / b if a and b else None


def best_of(measured, start):
    """The case of that name with the longest context: its shape, and its numbers."""
    cases = [(shape, v) for (what, shape), v in measured.items() if what == start]
    return max(cases, key=lambda c: [int(w) for w in c[0].split() if w.isdigit()][::-1]) if cases else ("", None)


def bars():
    measured, by = bench(), {name: model(name) for name in ("bf16", "fp8", "int4")}
    get = lambda name, what, n, column: by[name].get((what, n), {}).get(column)
    first = lambda what, column: next((v[column] for k, v in by["bf16"].items() if k[0] == what and column in v), None)
    most = max([k[1] for k in by["bf16"] if k[0] == "decode"], default=64)
    shape, attention = best_of(measured, "decode bf16")
    peak = next((v[2] for k, v in measured.items() if k[0].startswith("limit: product")), None)
    share = ratio(get("bf16", "decode", 1, "GB/s"), NOMINAL / 1e9)
    yield ("bf16 decode, 1 sequence, short context: share of 3.35 TB/s", *verdict(share, .70, .81))
    yield ("decode attention, %s: share of 3.35 TB/s" % (shape or "64 x 1 of 4096"),
           *verdict(ratio(attention[1] * 1e9, NOMINAL) if attention else None, .75, .85))
    yield ("prefill of 2048 tokens: share of the cuBLASLt peak measured here",
           *verdict(ratio(first("prefill", "TFLOP/s"), peak), .57, .68))
    yield ("%d sequences, context 1k: tokens/s" % most, *verdict(get("bf16", "decode", most, "tokens/s"), 5900, 6800, "%.0f"))
    for name, one, read in (("fp8", (1.4, 1.6), (1.3, 1.5)), ("int4", (1.7, 2.3), None)):
        yield ("%s over bf16, decode, 1 sequence" % name,
               *verdict(ratio(get(name, "decode", 1, "tokens/s"), get("bf16", "decode", 1, "tokens/s")), *one))
        if read:
            yield ("%s over bf16, prefill" % name,
                   *verdict(ratio(next((v["tokens/s"] for k, v in by[name].items() if k[0] == "prefill"), None), first("prefill", "tokens/s")), *read))
    for n in (1, most):
        yield ("no kernel between decode steps, %d in the worker: us" % n,
               *verdict(get("bf16", "decode", n, "idle us"), 60, 20, "%.0f", least=True))
    yield ("no kernel between decode steps, served over HTTP: us", *verdict(served_idle("bf16"), 60, 20, "%.0f", least=True))


def main():
    lines = list(bars())
    table(["bar", "measured", "floor / goal", ""], lines)
    with open(os.path.join(FOLDER, "bars.csv"), "w", newline="") as f:
        csv.writer(f).writerows([["bar", "measured", "floor / goal", "verdict"]] + lines)
    table(["what", "shape", "ms", "GB/s", "TFLOP/s", "share of this card's limit"], rows("bench.csv")[1:])
    for name in ("bf16", "fp8", "int4"):
        lines = rows("model-%s.csv" % name)
        if lines:
            table(lines[0], lines[1:])
    for name in ("bf16", "fp8", "int4"):
        lines = rows("serve-%s.csv" % name)
        if lines:
            table([name] + lines[0][1:], lines[1:])
    peer = rows("peer.csv")
    if peer:
        table(peer[0], peer[1:])


main()
