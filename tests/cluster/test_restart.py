#!/usr/bin/env python3
"""Goal: a rank killed with SIGKILL costs time and nothing else.

Method: the same requests (greedy, seeded, with logprobs) on an undisturbed cluster and on one whose
rank is killed in mid-stream; the texts must be equal to the letter, no event twice, none lost. Then
the whole server is killed: no rank may outlive it.
"""
import os
import signal
import threading
import time

from harness import Server, alive, run

REQUESTS = [
    {"prompt": "Once upon a time there was a", "max_tokens": 150, "temperature": 0, "ignore_eos": True},
    {"prompt": "The king said to his", "max_tokens": 150, "temperature": 0.9, "seed": 7, "ignore_eos": True},
    {"prompt": "In the garden", "max_tokens": 150, "temperature": 1.1, "top_p": 0.9, "seed": 11,
     "repetition_penalty": 1.1, "ignore_eos": True},
    {"prompt": "Alice", "max_tokens": 150, "temperature": 0.7, "top_k": 20, "seed": 3, "n": 2, "ignore_eos": True},
]


def collect(server, request, out, progress):
    texts, tokens = {}, 0
    for event in server.stream("/v1/completions", dict(request, stream_options={"include_usage": True})):
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            progress.append(1)
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    out.append((texts, tokens))


def answers(server, disturb=None):
    outs, progress = [[] for _ in REQUESTS], []
    threads = [threading.Thread(target=collect, args=(server, r, o, progress)) for r, o in zip(REQUESTS, outs)]
    for t in threads:
        t.start()
    if disturb:
        while len(progress) < 60:
            time.sleep(0.005)
        disturb()
    for t in threads:
        t.join()
    for request, out in zip(REQUESTS, outs):
        assert out, f"a stream failed: {request}"
        assert out[0][1] == request["max_tokens"] * request.get("n", 1), (request, out[0][1])
    return [o[0][0] for o in outs]


def a_killed_rank_costs_time_only(launcher):
    noticed = []
    with Server(*SERVE, "--launcher", launcher) as server:
        expected = answers(server)

        def kill():
            victim = server.workers()[-1]
            os.kill(victim, signal.SIGKILL)
            started = time.monotonic()
            while server.get("/health")[0] == 200 and time.monotonic() - started < 10:
                time.sleep(0.01)
            noticed.append(time.monotonic() - started)

        got = answers(server, kill)
        assert got == expected, f"expected {expected}\ngot      {got}"
        assert noticed[0] < 2, f"noticed after {noticed[0]:.2f} s"
        print(f"     noticed after {noticed[0]:.3f} s ({launcher})")
        end = time.monotonic() + 2  # the last step's news may be on its way
        while server.metric("vllm:num_requests_running") and time.monotonic() < end:
            time.sleep(0.02)
        assert server.metric("vllm:num_requests_running") == 0, "sequences left running"
        assert server.metric("heddle:requests_resumed_total") > 0, "no request was resumed: the kill came too late"
        assert answers(server) == expected, "another answer after the restart"


SERVE = [os.path.join(os.path.dirname(__file__), "..", "..", "models", "demo"), "--tp", "2"]


def rank_killed_under_mpirun():
    a_killed_rank_costs_time_only("mpirun")


def rank_killed_as_plain_process():
    a_killed_rank_costs_time_only("fork")


def a_stopped_rank_is_killed_and_replaced(launcher):
    """It lives, but does nothing: silence loses it, and what does not return is killed."""
    with Server(*SERVE, "--launcher", launcher) as server:
        expected = answers(server)
        stopped = []

        def stop():
            stopped.append(server.workers()[-1])
            os.kill(stopped[0], signal.SIGSTOP)

        got = answers(server, stop)
        assert got == expected, f"expected {expected}\ngot      {got}"
        assert not alive(stopped[0]), "the rank that hung is still there"
        assert server.metric("heddle:requests_resumed_total") > 0, "no request was resumed: the stop came too late"


def rank_stopped_under_mpirun():
    a_stopped_rank_is_killed_and_replaced("mpirun")


def rank_stopped_as_plain_process():
    a_stopped_rank_is_killed_and_replaced("fork")


def no_rank_outlives_the_server():
    for how in (signal.SIGTERM, signal.SIGKILL):
        server = Server(*SERVE)
        ranks = server.workers()
        assert len(ranks) == 2, ranks
        server.stop(how)
        end = time.monotonic() + 15
        while any(alive(p) for p in ranks) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(alive(p) for p in ranks), f"left after signal {how}: {ranks}"


if __name__ == "__main__":
    run([rank_killed_under_mpirun, rank_killed_as_plain_process, rank_stopped_under_mpirun,
         rank_stopped_as_plain_process, no_rank_outlives_the_server])
