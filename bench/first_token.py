#!/usr/bin/env python3
"""From the command to the first streamed token over HTTP: seconds from the start of `heddle serve MODEL`, which is asked
again and again until it answers, to the first piece of text. One line a run, then the median; files are in the page
cache after the first run, which is not counted.

usage: bench/first_token.py MODEL [--runs 10] [--rest 0] [--binary build/release/heddle] [--against OTHER] [OPTION OF SERVE ...]

--rest: seconds before each run. A virtual machine may give free memory back to its host after two seconds, and finding it
again is then part of a start: --rest 5 shows what a start costs on a machine that was at rest.
--against: another heddle whose runs alternate with these.
"""
import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import time

BODY = json.dumps({"prompt": [300, 400, 500, 600], "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def first_piece(port):
    """The time when the first token came, or None when nobody answers yet."""
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        c.request("POST", "/v1/completions", BODY, {"Content-Type": "application/json"})
        r = c.getresponse()
        if r.status != 200:
            return None
        for line in r:
            if line.startswith(b"data: {"):
                return time.perf_counter()
    except OSError:
        return None
    finally:
        c.close()
    return None


def run(binary, model, options):
    port = free_port()
    begin = time.perf_counter()
    server = subprocess.Popen([binary, "serve", model, "--port", str(port)] + options, stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            came = first_piece(port)
            if came:
                return came - begin
            time.sleep(0.005)
        raise SystemExit(f"the server ended with {server.returncode}")
    finally:
        server.send_signal(signal.SIGKILL if server.poll() is None else 0)
        server.wait()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--rest", type=float, default=0)
    p.add_argument("--binary", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "../build/release/heddle"))
    p.add_argument("--against")
    a, options = p.parse_known_args()
    times = {b: [] for b in (a.against, a.binary) if b}
    for i in range(a.runs + 1):
        for binary, seconds in times.items():
            time.sleep(a.rest if i else 0)
            s = run(binary, a.model, options)
            if i:
                seconds.append(s)
                print(f"{s:.3f} {binary}", flush=True)
    for binary, seconds in times.items():
        print(f"median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f}, {a.runs} runs of {binary}")


main()
