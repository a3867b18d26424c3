#!/usr/bin/env python3
"""What a returning conversation costs: time to the first token of a prompt that was served before and
that the device has forgotten since, when it is computed again, comes from host memory, or from disk.

usage: bench/tiers.py MODEL [--mode recompute|host|disk|all] [--tokens 4096] [--returns 5] [--heddle FILE]
                      [--disk DIR] [--out bench/results/tiers.csv] [--label TEXT]

The device holds one conversation and a bit; the others take turns, so that each one that returns finds
its blocks gone; with the disk, four others come between, of which host memory holds two. MODEL may be a folder made by bench/make_shape.py (weights do not matter here).
"""
import argparse
import csv
import datetime
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, a, extra):
        self.port = free_port()
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [a.heddle, "serve", a.model, "--port", str(self.port), "--launcher", "fork", "--load-format", "dummy",
             "--block-size", "16", "--max-model-len", str(a.tokens + 64), "--max-num-seqs", "2",
             "--max-num-batched-tokens", "256", "--num-blocks-override", str((a.tokens + 64) // 16 + 24), *extra],
            stdout=self.log, stderr=subprocess.STDOUT)
        while self.get("/health")[0] != 200:
            time.sleep(0.05)
            assert self.process.poll() is None, self.output()

    def output(self):
        self.log.seek(0)
        return self.log.read()[-4000:]

    def get(self, path):
        try:
            c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            c.request("GET", path)
            r = c.getresponse()
            return r.status, r.read().decode()
        except OSError:
            return 0, ""

    def ask(self, ids):
        body = json.dumps({"prompt": ids, "max_tokens": 1, "temperature": 0})
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        start = time.monotonic()
        c.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        r = json.loads(c.getresponse().read())
        took = time.monotonic() - start
        return took, r["usage"]["prompt_tokens_details"]["cached_tokens"]

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


def block_bytes(a):
    """Of 16 tokens in bf16."""
    with open(os.path.join(a.model, "config.json")) as f:
        c = json.load(f)
    heads = c.get("num_key_value_heads", c["num_attention_heads"])
    return c["num_hidden_layers"] * 2 * heads * c["head_dim"] * 2 * 16


def measure(a, mode):
    n_blocks, size = a.tokens // 16, block_bytes(a)
    n_conversations = 5 if mode == "disk" else 2
    extra = {"recompute": [],
             "host": ["--swap-bytes", str(4 * n_blocks * size)],
             "disk": ["--swap-bytes", str(n_blocks * 5 // 2 * size), "--kv-disk", a.disk,
                      "--kv-disk-space", str(8 * n_blocks * (size + 4096))]}[mode]
    dice = random.Random(1)
    prompts = [[dice.randrange(1000, 100000) for _ in range(a.tokens)] for _ in range(n_conversations)]
    server, times, hits = Server(a, extra), [], []
    try:
        first = [] if mode == "recompute" else [server.ask(p)[0] for p in prompts]
        if mode == "recompute":
            server.ask(prompts[0])
        for i in range(a.returns if mode != "recompute" else min(a.returns, 3)):
            if mode == "disk":
                time.sleep(0.3)  # what was pushed out is written beside the steps
            took, cached = server.ask(prompts[(i + (mode == "recompute")) % n_conversations])
            times.append(took)
            hits.append(cached)
        for line in server.get("/metrics")[1].splitlines():
            if line.startswith("heddle:kv_") and not line.endswith(" 0"):
                print("   ", line)
    finally:
        server.stop()
    print(f"{mode:10} TTFT median {statistics.median(times) * 1e3:.0f} ms of {[round(t * 1e3) for t in times]}, "
          f"cached {hits} of {a.tokens}, first time {[round(t * 1e3) for t in first]}", flush=True)
    return [mode, a.tokens, len(times), f"{statistics.median(times) * 1e3:.1f}", f"{min(times) * 1e3:.1f}",
            f"{max(times) * 1e3:.1f}", int(statistics.median(hits)), size]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--mode", default="all")
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--returns", type=int, default=5)
    p.add_argument("--heddle", default="build/release/heddle")
    p.add_argument("--disk", default=tempfile.gettempdir())
    p.add_argument("--label", default="")
    p.add_argument("--out", default="bench/results/tiers.csv")
    a = p.parse_args()
    head = ["date", "commit", "machine", "model", "from", "tokens", "returns", "TTFT median ms", "TTFT min ms",
            "TTFT max ms", "tokens found", "bytes of a block of 16"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for mode in ("recompute", "host", "disk") if a.mode == "all" else (a.mode,):
        row = measure(a, mode)
        new = not os.path.exists(a.out)
        with open(a.out, "a", newline="") as f:
            w = csv.writer(f, lineterminator="\n")
            if new:
                w.writerow(head)
            w.writerow([datetime.date.today().isoformat(), commit, a.label,
                        os.path.basename(a.model.rstrip("/")), *row])


if __name__ == "__main__":
    main()
