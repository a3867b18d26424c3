#!/usr/bin/env python3
"""What tools/gpu_suite.sh measured, as tables: kernels and serving, each against its bar and against the
limit measured on the same card. Bars are for one H100 and a Llama-3.1-8B; a row that was not measured
says so. usage: gpu_table.py DIR with bench.csv, serve-*.csv, peer.csv"""
import csv
import os
import sys

FOLDER = sys.argv[1]
BYTES_PER_TOKEN = {"bf16": 15.01e9, "fp8": 8.03e9, "int4": 4.76e9}  # weights read for one token
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


def share(value, floor, goal, form="%.2f"):
    if value is None:
        return "not measured", "%s / %s" % (form % floor, form % goal), ""
    word = "goal met" if value >= goal else "floor met" if value >= floor else "MISSED"
    return form % value, "%s / %s" % (form % floor, form % goal), word


def bars():
    measured, speed = bench(), {name: serving(name) for name in ("bf16", "fp8", "int4")}
    one = {name: s.get(1) for name, s in speed.items()}
    decode = [v[1] * 1e9 / NOMINAL for k, v in measured.items() if k[0] == "decode bf16" and k[1].startswith("64 x 1 of 4096")]
    best = [v[2] for k, v in measured.items() if k[0].startswith("limit: product")]
    prefill = [v[2] for k, v in measured.items() if k == ("product bf16", "2048x28672x4096")]
    ratio = lambda name: one[name] / one["bf16"] if one[name] and one["bf16"] else None
    yield ("decode, 1 client, share of 3.35 TB/s", *share(one["bf16"] * BYTES_PER_TOKEN["bf16"] / NOMINAL if one["bf16"] else None, .70, .81))
    yield ("decode attention, 64 of 4096, share of 3.35 TB/s", *share(decode[0] if decode else None, .75, .85))
    yield ("product of 2048 rows, share of this card's best", *share(prefill[0] / best[0] if prefill and best and best[0] else None, .57, .68))
    yield ("64 clients, tokens a second", *share(speed["bf16"].get(64), 5900, 6800, "%.0f"))
    yield ("fp8 over bf16, 1 client", *share(ratio("fp8"), 1.4, 1.6))
    yield ("int4 over bf16, 1 client", *share(ratio("int4"), 1.7, 2.3))


def main():
    table(["bar", "measured", "floor / goal", ""], list(bars()))
    table(["what", "shape", "ms", "GB/s", "TFLOP/s", "share of this card's limit"], rows("bench.csv")[1:])
    for name in ("bf16", "fp8", "int4"):
        lines = rows("serve-%s.csv" % name)
        if lines:
            table([name] + lines[0][1:], lines[1:])
    peer = rows("peer.csv")
    if peer:
        table(peer[0], peer[1:])


main()
