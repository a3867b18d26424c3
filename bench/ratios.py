#!/usr/bin/env python3
"""Medians and ratios of ours to theirs, round by round, from bench/results/cpu-model.csv and cpu-serve.csv.

usage: bench/ratios.py [--commit ID] [--since ROUND]
"""
import argparse
import collections
import csv
import os
import statistics

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
BESIDE = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0", "int4 with head": "q4_0"}


def read(name, a):
    with open(os.path.join(RESULTS, name)) as f:
        rows = [r for r in csv.DictReader(f) if not a.commit or r["commit"].startswith(a.commit)]
    return [r for r in rows if int(r["round"]) >= a.since]


def number(text):
    return float(text) if text else 0.0


def line(what, ours, theirs_by_engine):
    print(f"{what}: ours {statistics.median(ours.values()):.4g} ({len(ours)} rounds)", end="")
    for engine, theirs in sorted(theirs_by_engine.items()):
        pairs = [ours[r] / theirs[r] for r in ours if theirs.get(r)]
        if pairs:
            print(f"; {engine} {statistics.median(theirs.values()):.4g}, ratio {statistics.median(pairs):.2f}"
                  f" ({min(pairs):.2f} to {max(pairs):.2f})", end="")
    print()


def model(rows):
    shapes = sorted({(r["shape"], r["case"]) for r in rows})
    for shape, case in shapes:
        for form, beside in BESIDE.items():
            for column in ("prefill tokens/s", "decode tokens/s", "share of read"):
                table = collections.defaultdict(dict)
                for r in rows:
                    wanted = form if r["engine"] == "heddle" else beside
                    if r["shape"] == shape and r["case"] == case and r["format"] == wanted and number(r[column]):
                        table[r["engine"]][r["round"]] = number(r[column])
                ours = table.pop("heddle", None)
                if ours:
                    line(f"{shape} {case} {form} {column}", ours, table)


def serve(rows):
    for shape, clients in sorted({(r["shape"], int(r["clients"])) for r in rows}):
        for column in ("output tokens/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms"):
            table = collections.defaultdict(dict)
            for r in rows:
                if r["shape"] == shape and int(r["clients"]) == clients:
                    table[r["engine"]][r["round"]] = number(r[column])
            ours = table.pop("heddle int4", None)
            if ours:
                line(f"{shape} {clients} clients {column}", ours, table)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--commit", default="")
    p.add_argument("--since", type=int, default=0)
    a = p.parse_args()
    model(read("cpu-model.csv", a))
    serve(read("cpu-serve.csv", a))


main()
