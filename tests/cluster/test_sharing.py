#!/usr/bin/env python3
"""Goal: choices of one request share their prompt's blocks, and a model with a sliding window holds no more
blocks than the window needs, however long the answer grows.

Method: the gauge of held blocks while answers stream, against what the blocks alone would take.
"""
import tempfile

from harness import Server, run
from test_beams import folder_of

BLOCK = 8


def most_held(server, body):
    """The most blocks held while the answer streams, and how many tokens it had."""
    held, n = 0, 0
    body = dict(body, temperature=0.8, seed=3, ignore_eos=True, stream_options={"include_usage": True})
    for i, event in enumerate(server.stream("/v1/completions", body)):
        if event.get("usage"):
            n = event["usage"]["completion_tokens"]
        if i % 8:
            continue
        for line in server.get("/metrics")[1].splitlines():
            if line.startswith("heddle:kv_blocks{") and 'state="held"' in line:
                held = max(held, int(float(line.rsplit(" ", 1)[1])))
    return held, n


def choices_share_their_prompt():
    ids = [5 + i % 90 for i in range(96)]  # 12 blocks
    with tempfile.TemporaryDirectory() as scratch, Server(folder_of("llama", scratch), "--block-size", str(BLOCK)) as s:
        alone, _ = most_held(s, {"prompt": ids, "max_tokens": 40})
        four, n = most_held(s, {"prompt": ids, "max_tokens": 40, "n": 4})
        print(f"     one choice holds {alone} blocks, four hold {four} ({s.metric('heddle:forks_total'):.0f} forks)")
        assert n >= 100 and alone >= 15, (n, alone)
        assert four <= 12 + 4 * 7, four  # each of its own: 40 tokens, the copied block, one ahead
        assert four > alone


def a_window_holds_what_it_sees():
    with tempfile.TemporaryDirectory() as scratch, Server(folder_of("mistral", scratch), "--block-size", str(BLOCK)) as s:
        held, n = most_held(s, {"prompt": [3, 9, 4, 7], "max_tokens": 110})
        print(f"     window of 24 tokens: {held} blocks of {BLOCK} for {n} tokens")
        assert n >= 100 and held <= 24 // BLOCK + 4, held  # the window, its edges, one ahead, plans under way


if __name__ == "__main__":
    run([choices_share_their_prompt, a_window_holds_what_it_sees])
