#!/usr/bin/env python3
"""Goal: a recorded run can be computed again, bit for bit, whatever happened in it, and a broken
record is refused or read as far as it goes.

Method: a real server with two groups, drafts and far too few KV blocks; streams that end, that are
cancelled, that share prompts, beams; a rank killed in the middle. `heddle replay` must find every
plan equal and every request ended. Then the file is cut and damaged.
"""
import os
import random
import re
import signal
import subprocess
import tempfile
import threading

from harness import DEMO, HEDDLE, Server, environment, run

TALE = "Once upon a time there was a king who had a garden and in the garden there was a"


def requests():
    for i in range(24):
        yield dict({"prompt": TALE[:10 + 3 * i], "max_tokens": 90, "temperature": 0.8, "seed": i, "ignore_eos": True},
                   **[{}, {"n": 2}, {"temperature": 0, "max_tokens": 160}, {"priority": 1}, {"logprobs": 2},
                      {"use_beam_search": True, "n": 2, "max_tokens": 30, "temperature": 0, "seed": None}][i % 6])


def ask(server, request, n_events, out):
    """Reads n_events of the stream and leaves, or all of it."""
    if request.get("use_beam_search"):
        request = {k: v for k, v in request.items() if v is not None}
        status, body = server.post("/v1/completions", request)
        out.append(status)
        return
    for i, _ in enumerate(server.stream("/v1/completions", request)):
        if n_events and i >= n_events:
            return
    out.append(200)


def record(path):
    dice = random.Random(5)
    args = ["--dp", "2", "--speculative-tokens", "4", "--record", path, "--max-num-seqs", "10", "--block-size", "8",
            "--num-blocks-override", "70", "--max-num-batched-tokens", "64", "--launcher", "fork"]
    with Server(DEMO, *args) as server:
        threads, out = [], []
        for i, request in enumerate(requests()):
            leaves = dice.randrange(1, 40) if i % 4 == 3 else 0
            threads.append(threading.Thread(target=ask, args=(server, request, leaves, out)))
        for t in threads[:16]:
            t.start()
        threads[2].join()  # some way in
        os.kill(server.workers()[-1], signal.SIGKILL)
        for t in threads[16:]:
            t.start()
        for t in threads:
            t.join()
        counts = {name: server.metric(name) for name in
                  ("vllm:num_preemptions_total", "heddle:requests_resumed_total")}
        server.stop()
    assert out.count(200) >= 18, out
    return counts


def replay(path, code):
    done = subprocess.run([HEDDLE, "replay", path], capture_output=True, text=True, timeout=120, env=environment())
    text = done.stdout + done.stderr
    assert done.returncode in code, f"exit code {done.returncode}\n{text}"
    assert "Sanitizer" not in text and "assertion failed" not in text, text
    return {name: int(n) for n, name in re.findall(r"(\d+) (inputs|requests|ended|tokens|plans)", text)}, text


def a_run_replays_bit_for_bit():
    counts = record(PATH)
    assert counts["vllm:num_preemptions_total"] > 0 and counts["heddle:requests_resumed_total"] > 0, counts
    found, text = replay(PATH, [0])
    ended = int(re.search(r"\((\d+) ended\)", text).group(1))
    assert found["requests"] == ended and found["plans"] > 100 and found["tokens"] > 1500, text
    assert replay(PATH, [0])[1] == text, "replayed twice, it tells two tales"
    print("     " + text.strip())


def a_cut_record_is_read_as_far_as_it_goes():
    whole = open(PATH, "rb").read()
    plans = replay(PATH, [0])[0]["plans"]
    for share in (0.9, 0.5, 0.1):
        with tempfile.NamedTemporaryFile() as f:
            f.write(whole[:int(len(whole) * share)])
            f.flush()
            n = replay(f.name, [0])[0]["plans"]
            assert n < plans and n > plans * share / 4, (share, n, plans)


def a_damaged_record_is_refused():
    whole = open(PATH, "rb").read()
    dice, refused = random.Random(3), 0
    for kind in range(12):
        bytes_ = bytearray(whole)
        if kind == 0:
            bytes_ = bytearray(b"not a record at all")
        elif kind == 1:
            bytes_ = bytearray()
        elif kind == 2:
            bytes_[8:] = bytes(dice.randrange(256) for _ in range(5000))
        else:
            at = dice.randrange(8, len(bytes_))
            bytes_[at] ^= 1 << dice.randrange(8)
        with tempfile.NamedTemporaryFile() as f:
            f.write(bytes_)
            f.flush()
            _, text = replay(f.name, [0, 1])
            refused += "replay:" in text
    assert refused >= 6, refused
    assert "/nonexistent" in replay("/nonexistent", [1])[1]


with tempfile.TemporaryDirectory() as folder:
    PATH = os.path.join(folder, "record")
    run([a_run_replays_bit_for_bit, a_cut_record_is_read_as_far_as_it_goes, a_damaged_record_is_refused])
