#!/usr/bin/env python3
"""Goal: a draft model changes nothing that a client sees, whatever dies, and says what it did.

Method: the demo model with its own first two layers as draft model, made here, drafting in every
step; greedy and seeded answers, several choices, penalties and logprobs must be those of a server
without one, also when a rank is killed in mid-stream.
"""
import os
import shutil
import signal
import subprocess
import tempfile

from harness import DEMO, GOLDEN, HEDDLE, Server, environment, first_layers, run
from test_restart import REQUESTS, answers

FOLDER = tempfile.mkdtemp()
DRAFT = os.path.join(FOLDER, "draft")
ALWAYS = ["--draft-model", DRAFT, "--draft-policy", "always", "--speculative-tokens", "3"]
LOGPROBS = {"prompt": "The fox", "max_tokens": 40, "temperature": 0.8, "seed": 5, "logprobs": 3, "ignore_eos": True}
for request in REQUESTS:
    request["max_tokens"] = 60
expected = {}


def logprobs(server):
    status, answer = server.post("/v1/completions", LOGPROBS)
    assert status == 200, answer
    return answer["choices"][0]["text"], answer["choices"][0]["logprobs"]


def one_rank_gives_the_same():
    with Server(DEMO) as server:
        expected["texts"], expected["logprobs"] = answers(server), logprobs(server)
    with Server(DEMO, *ALWAYS) as server:
        got = answers(server)
        assert got == expected["texts"], f"expected {expected['texts']}\ngot      {got}"
        assert logprobs(server) == expected["logprobs"]
        tried = server.metric('heddle:draft_tokens_total')
        kept = server.metric('heddle:draft_tokens_kept_total')
        assert tried > 200 and 0 < kept < tried, (tried, kept)
        lines = server.get("/metrics")[1].splitlines()
        own = [l for l in lines if l.startswith("heddle:draft_tokens_total") and 'kind="model"' in l]
        assert float(own[0].rsplit(" ", 1)[1]) > 200, own


def two_ranks_give_the_same_and_survive_a_kill():
    with Server(DEMO, "--tp", "2", "--launcher", "fork") as server:
        wanted = answers(server)
    with Server(DEMO, "--tp", "2", "--launcher", "fork", *ALWAYS) as server:
        got = answers(server, lambda: os.kill(server.workers()[-1], signal.SIGKILL))
        assert got == wanted, f"expected {wanted}\ngot      {got}"
        assert server.metric("heddle:requests_resumed_total") > 0, "no request was resumed"
        assert server.metric("heddle:draft_tokens_total") > 200


def another_vocabulary_is_refused():
    other = os.path.join(GOLDEN, "llama")
    for verb in ("serve", "plan"):
        p = subprocess.run([HEDDLE, verb, DEMO, "--draft-model", other], capture_output=True, text=True,
                           env=environment(), timeout=60)
        assert p.returncode == 1, p
        assert other in p.stderr and "512" in p.stderr and "4096" in p.stderr, p.stderr
    p = subprocess.run([HEDDLE, "plan", DEMO, "--draft-model", DRAFT], capture_output=True, text=True,
                       env=environment(), timeout=60)
    assert p.returncode == 0 and "draft model" in p.stdout, p


try:
    first_layers(DEMO, DRAFT, 2)
    run([one_rank_gives_the_same, two_ranks_give_the_same_and_survive_a_kill, another_vocabulary_is_refused])
finally:
    shutil.rmtree(FOLDER)
