#!/usr/bin/env python3
"""Perplexity of a text on a running cluster: what quantization costs in quality.

Scores the text in windows through /v1/completions with echo and logprobs, so the whole serving path is
measured. usage: bench/perplexity.py --port P FILE [--window 512]
"""
import argparse
import json
import math
import urllib.request


def post(a, path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{a.port}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("file")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--window", type=int, default=512)
    a = p.parse_args()
    with open(a.file) as f:
        ids = post(a, "/tokenize", {"prompt": f.read(), "add_special_tokens": False})["tokens"]
    total, n = 0.0, 0
    for at in range(0, len(ids) - 1, a.window):
        piece = ids[at:at + a.window]
        if len(piece) < 2:
            break
        answer = post(a, "/v1/completions", {"prompt": piece, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0})
        scores = [s for s in answer["choices"][0]["logprobs"]["token_logprobs"] if s is not None]
        assert len(scores) == len(piece) - 1, (len(scores), len(piece))
        total, n = total - sum(scores), n + len(scores)
    print(f"{math.exp(total / n):.4f} over {n} tokens")


main()
