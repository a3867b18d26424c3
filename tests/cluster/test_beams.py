#!/usr/bin/env python3
"""Goal: beam search over HTTP gives the beams of Hugging Face's generate(), whatever the width, the length
penalty, early stopping and the stop ids.

Method: tests/golden/*/beams.json through a whole server (HTTP, engine, ranks), all cases of a model at
once, so that searches share steps and blocks. Tokens must be equal, scores to four digits; the best n of
the width are the first n. The golden without a tokenizer borrows another's: only ids are spoken here.
And best_of with echo and logprobs: the prompt's scores are those of a plain request.
"""
import json
import os
import tempfile
import threading

from harness import GOLDEN, Server, run

OPTIONS = ["--dtype", "float32", "--kv-cache-dtype", "float32", "--max-num-seqs", "40", "--block-size", "8"]


def folder_of(name, scratch):
    source, folder = os.path.join(GOLDEN, name), os.path.join(scratch, name)
    os.mkdir(folder)
    for file in os.listdir(source):
        os.symlink(os.path.join(source, file), os.path.join(folder, file))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if not os.path.exists(os.path.join(folder, file)):
            os.symlink(os.path.join(GOLDEN, "gpt2", file), os.path.join(folder, file))
    return folder


def search(server, case, n, out):
    status, r = server.post("/v1/completions", {
        "prompt": case["ids"], "max_tokens": case["max_new_tokens"], "n": n, "use_beam_search": True,
        "beam_width": case["num_beams"], "length_penalty": case["length_penalty"],
        "early_stopping": case["early_stopping"], "stop_token_ids": case["eos_token_id"], "ignore_eos": True,
        "logprobs": 0, "return_token_ids": True, "temperature": 0})
    out.append((case, n, status, r))


def compare(case, n, status, r):
    assert status == 200, r
    assert len(r["choices"]) == n
    for choice, beam in zip(r["choices"], case["beams"]):
        what = {k: v for k, v in case.items() if k not in ("ids", "beams")}
        assert choice["token_ids"] == beam["tokens"], f"{what}\nexpected {beam['tokens']}\ngot      {choice['token_ids']}"
        score = sum(choice["logprobs"]["token_logprobs"]) / len(beam["tokens"]) ** case["length_penalty"]
        assert abs(score - beam["score"]) < 1e-3 * max(1, abs(beam["score"])), (what, score, beam["score"])
        ended = beam["tokens"][-1] in case["eos_token_id"]
        assert choice["finish_reason"] == ("stop" if ended else "length"), (what, choice["finish_reason"])


def beams_of(name):
    with open(os.path.join(GOLDEN, name, "beams.json")) as f:
        cases = json.load(f)["cases"]
    with tempfile.TemporaryDirectory() as scratch, Server(folder_of(name, scratch), *OPTIONS) as server:
        out, threads = [], []
        for i, case in enumerate(cases):
            for n in {case["num_beams"], 1 + i % case["num_beams"]}:
                threads.append(threading.Thread(target=search, args=(server, case, n, out)))
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for result in out:
            compare(*result)
        print(f"     {name}: {len(out)} searches, {server.metric('heddle:forks_total'):.0f} forks")
        assert len(out) == len(threads)
        if name == "llama":
            best_of_scores_its_prompt(server, cases[1]["ids"])


def best_of_scores_its_prompt(server, ids):
    ask = {"prompt": ids, "max_tokens": 4, "echo": True, "logprobs": 2, "temperature": 1, "seed": 5, "ignore_eos": True}
    plain = server.post("/v1/completions", ask)[1]["choices"][0]["logprobs"]
    best = server.post("/v1/completions", dict(ask, best_of=3))[1]["choices"][0]["logprobs"]
    n = len(ids)
    assert best["token_logprobs"][0] is None and None not in best["token_logprobs"][1:], best["token_logprobs"]
    assert best["token_logprobs"][:n] == plain["token_logprobs"][:n], (best, plain)
    assert best["top_logprobs"][:n] == plain["top_logprobs"][:n]


def all_models():
    names = sorted(n for n in os.listdir(GOLDEN) if os.path.exists(os.path.join(GOLDEN, n, "beams.json")))
    assert len(names) >= 5, names
    for name in names:
        beams_of(name)


if __name__ == "__main__":
    run([all_models])
