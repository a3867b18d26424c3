#!/usr/bin/env python3
"""Closed-loop streaming clients against any OpenAI-compatible port or llama-server's own.

Each of C clients sends one request after another: a prompt of random token ids that shares no prefix
with another, greedy, ignoring the end of sequence. Standard library only.
usage: bench/load.py --port P [--api openai|llama] [--clients 1,4,16] [--requests-each 3] [--vocab N]
                     [--prompt 128] [--output 64]
"""
import argparse
import asyncio
import json
import random
import time


def percentile(values, p):
    values = sorted(values)
    if not values:
        return float("nan")
    at = (len(values) - 1) * p
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def request_of(a, rng):
    prompt = [rng.randrange(300, a.vocab - 10) for _ in range(a.prompt)]
    if a.api == "llama":
        return "/completion", {"prompt": prompt, "n_predict": a.output, "stream": True, "ignore_eos": True,
                               "cache_prompt": False, "samplers": ["top_k"], "top_k": 1, "seed": 1}
    return "/v1/completions", {"model": a.model, "prompt": prompt, "max_tokens": a.output, "stream": True,
                               "ignore_eos": True, "temperature": 0.0}


async def one(a, rng):
    path, body = request_of(a, rng)
    if not a.model:
        body.pop("model", None)
    raw = json.dumps(body).encode()
    started, stamps = time.perf_counter(), []
    reader, writer = await asyncio.open_connection(a.host, a.port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                 f"Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    await writer.drain()
    status = await reader.readline()
    if b" 200" not in status:
        raise RuntimeError((status + await reader.read(2000)).decode("latin1"))
    while line := await reader.readline():
        if not line.startswith(b"data:"):
            continue
        now, data = time.perf_counter(), line[5:].strip()
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if a.api == "llama":
            if event.get("stop") is not True:
                stamps.append(now)
        elif event.get("choices"):
            stamps.append(now)
    writer.close()
    return started, stamps, time.perf_counter()


async def client(a, rng, todo, done):
    while todo:
        todo.pop()
        done.append(await one(a, rng))


async def level(a, n_clients):
    n = max(4, n_clients * a.requests_each)
    todo, done, rng = [0] * n, [], random.Random(1000 + n_clients)
    started = time.perf_counter()
    await asyncio.gather(*[client(a, rng, todo, done) for _ in range(n_clients)])
    seconds = time.perf_counter() - started
    ttft = [1e3 * (s[0] - t) for t, s, _ in done if s]
    gaps = [1e3 * (y - x) for _, s, _ in done for x, y in zip(s, s[1:])]
    row = (a.tag, n_clients, n, round(n * a.output / seconds, 1), round(percentile(ttft, .5)), round(percentile(ttft, .99)),
           round(percentile(gaps, .5), 1), round(percentile(gaps, .99), 1), min(len(s) for _, s, _ in done))
    print(",".join(map(str, row)), flush=True)


async def main():
    p = argparse.ArgumentParser()
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--api", default="openai", choices=["openai", "llama"])
    p.add_argument("--clients", default="1,4,16")
    p.add_argument("--requests-each", type=int, default=3)
    p.add_argument("--vocab", type=int, default=151936)
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--output", type=int, default=64)
    p.add_argument("--model", default="")
    p.add_argument("--tag", default="")
    a = p.parse_args()
    await one(a, random.Random(99))
    print("tag,clients,requests,output tokens/s,TTFT p50 ms,TTFT p99 ms,ITL p50 ms,ITL p99 ms,fewest events")
    for n in map(int, a.clients.split(",")):
        await level(a, n)


asyncio.run(main())
