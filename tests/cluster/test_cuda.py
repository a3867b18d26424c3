#!/usr/bin/env python3
"""Goal: serving on the CUDA backend, whole, without a GPU: the emulated plugin and a stand-in of NCCL.

Method: greedy answers on the CPU are the reference. The same requests on one rank and on two, with
steps replayed as graphs; the log of the stand-in says in what order the host launched steps and
saw them end. A draft model, whose tokens must be those without one. Then ranks that die, hang and fault in mid-stream: time is lost and nothing else.
"""
import os
import signal
import subprocess
import tempfile
import threading
import time

from harness import BINARY_DIR, DEMO, HEDDLE, Server, environment, first_layers, free_port, run, skip

PLUGIN_DIR = os.path.join(BINARY_DIR, "emulated")
PROMPTS = ["Once upon a time there was a", "The king said to his"]
TOKENS = 12
NEAR = 0.25  # logprobs
SMALL = ["--max-num-seqs", "4", "--max-model-len", "256", "--max-num-batched-tokens", "64"]


class Cuda:
    """A server whose device is the stand-in; log and once are its two files."""

    def __init__(self, *args, settings="", seconds=None):
        self.dir = tempfile.TemporaryDirectory()
        self.log = os.path.join(self.dir.name, "log")
        self.once = os.path.join(self.dir.name, "once")
        env = {"HEDDLE_PLUGIN_DIR": PLUGIN_DIR, "HEDDLE_FAKE_GPU_LOG": self.log, "HEDDLE_FAKE_GPU_ONCE": self.once,
               "HEDDLE_FAKE_GPU": settings}
        kept = {name: os.environ.get(name) for name in (*env, "ASAN_OPTIONS")}
        os.environ.update(env)
        os.environ["ASAN_OPTIONS"] = (kept["ASAN_OPTIONS"] or "") + ":alloc_dealloc_mismatch=0"
        try:
            self.server = Server(DEMO, "--device", "cuda", *SMALL, *args)
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def fail(self, how):
        """The first device to work from now on has a "fault" or a "hang"."""
        with open(self.once + ".new", "w") as f:
            f.write(how)
        os.rename(self.once + ".new", self.once)

    def __enter__(self):
        return self.server.__enter__()

    def __exit__(self, *how):
        self.server.__exit__(*how)
        self.dir.cleanup()


def collect(server, prompt, out, progress):
    """[(token's text, logprob, logprob of the second best)]"""
    request = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    found = []
    for event in server.stream("/v1/completions", request):
        for choice in event["choices"]:
            logprobs = choice["logprobs"]
            for token, first, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
                found.append((token, first, min(top.values())))
            progress.append(1)
    out.append(found)


def answers(server, disturb=None):
    outs, progress = [[] for _ in PROMPTS], []
    threads = [threading.Thread(target=collect, args=(server, p, o, progress)) for p, o in zip(PROMPTS, outs)]
    for t in threads:
        t.start()
    if disturb:
        while len(progress) < 6:
            time.sleep(0.005)
        disturb()
    for t in threads:
        t.join()
    assert all(outs), f"a stream failed: {outs}"
    assert all(len(o[0]) == TOKENS for o in outs), [len(o[0]) for o in outs]
    return [o[0] for o in outs]


def reference():
    with Server(DEMO, "--device", "cpu", *SMALL) as server:
        return answers(server)


def check(got, expected, what):
    """Token by token; where two were nearly as likely, BF16 may take the other, and the rest is another
    story."""
    n_same = 0
    for one, reference in zip(got, expected):
        for (token, logprob, _), (wanted, best, second) in zip(one, reference):
            if token != wanted:
                assert best - second < NEAR, f"{what}: {token!r} instead of {wanted!r} ({best:.3f} to {second:.3f})"
                break
            assert abs(logprob - best) < NEAR, f"{what}: {token!r} has {logprob:.3f}, not {best:.3f}"
            n_same += 1
    assert n_same >= TOKENS * len(PROMPTS) // 2, f"{what}: only {n_same} tokens alike"
    return n_same


def launched_before_waiting(log):
    """Of the steps between the first and the last ones: was the next launched before this was seen to
    end? Returns how many were, of how many, and how many graphs ran."""
    at, n_graphs, n_blocked = {}, 0, 0
    with open(log) as f:
        for place, line in enumerate(f):
            _, what, n = line.split()
            n_graphs += what == "graph"
            if what in ("record", "passed"):
                at.setdefault((what, int(n)), place)
            n_blocked += what == "waits" and ("graph" in at)
    last = max(n for what, n in at if what == "record")
    steps = [n for n in range(5, last - 2)]
    good = [n for n in steps if at[("record", n + 1)] < at.get(("passed", n), 1 << 60)]
    return len(good), len(steps), n_graphs


def one_rank_without_gaps():
    cuda = Cuda()
    with cuda as server:
        n_same = check(answers(server), EXPECTED, "one rank")
        good, steps, graphs = launched_before_waiting(cuda.log)
    print(f"     {good} of {steps} steps were launched before the one before had ended; {graphs} graphs; "
          f"{n_same} tokens as on the CPU")
    assert steps >= 5 and graphs >= TOKENS // 3, (steps, graphs)
    assert good >= 0.9 * steps, f"only {good} of {steps} steps were launched ahead"


def texts(answer):
    return ["".join(token for token, _, _ in one) for one in answer]


def a_draft_model_changes_nothing():
    """Exactly, where every sum keeps its order; on two ranks up to what BF16 decides otherwise. In the
    end a fault, so that a draft's cache is lost and caught up with."""
    with tempfile.TemporaryDirectory() as folder:
        draft = os.path.join(folder, "draft")
        first_layers(DEMO, draft, 2)
        always = ["--draft-model", draft, "--draft-policy", "always", "--speculative-tokens", "3"]
        with Cuda("--deterministic") as server:
            expected = answers(server)
        check(expected, EXPECTED, "with sums in one order")
        cuda = Cuda("--deterministic", *always)
        with cuda as server:
            got = answers(server)
            assert texts(got) == texts(expected), f"expected {texts(expected)}, got {texts(got)}"
            tried, kept = server.metric("heddle:draft_tokens_total"), server.metric("heddle:draft_tokens_kept_total")
            assert tried >= TOKENS and 0 < kept <= tried, (tried, kept)
            got = answers(server, lambda: cuda.fail("fault"))
            assert texts(got) == texts(expected), f"after a fault: expected {texts(expected)}, got {texts(got)}"
            assert server.metric("heddle:requests_resumed_total") > 0, "no request was resumed: the fault came too late"
        with Cuda("--tp", "2", "--launcher", "fork", *always, settings="devices=2") as server:
            check(answers(server), EXPECTED, "two ranks with drafts")
            assert server.metric("heddle:draft_tokens_total") >= TOKENS
    print(f"     {kept:.0f} of {tried:.0f} drafts were kept")


def two_ranks_and_a_killed_one():
    with Cuda("--tp", "2", "--launcher", "fork", settings="devices=2") as server:
        expected = answers(server)
        check(expected, EXPECTED, "two ranks")
        assert "collective nccl joins 2 ranks" in server.output()
        got = answers(server, lambda: os.kill(server.workers()[-1], signal.SIGKILL))
        check(got, expected, "after a rank was killed")
        assert server.metric("heddle:requests_resumed_total") > 0, "no request was resumed: the kill came too late"


def a_fault_costs_time_only():
    """An error of the device that stays: the rank says so, its process ends and is started again."""
    cuda = Cuda()
    with cuda as server:
        expected = answers(server)
        check(expected, EXPECTED, "before the fault")
        pid = server.workers()[0]
        check(answers(server, lambda: cuda.fail("fault")), expected, "after a fault")
        assert "an illegal memory access was encountered" in server.output()
        assert server.workers() and server.workers()[0] != pid, "the process of a lost device goes on"
        assert server.metric("heddle:requests_resumed_total") > 0, "no request was resumed: the fault came too late"


def a_hang_costs_time_only():
    """A step that never ends, on one of two ranks: the watchdog ends the group; who hangs leaves."""
    cuda = Cuda("--tp", "2", "--launcher", "fork", "--watchdog-timeout", "4", settings="devices=2")
    with cuda as server:
        expected = answers(server)
        pids = set(server.workers())
        check(answers(server, lambda: cuda.fail("hang")), expected, "after a hang")
        assert "a step was not answered in time" in server.output()
        assert len(pids & set(server.workers())) == 1, "one rank was to be replaced, the other was to stay"


def refused(settings, *args, words):
    env = dict(environment(), HEDDLE_PLUGIN_DIR=PLUGIN_DIR, HEDDLE_FAKE_GPU=settings)
    env["ASAN_OPTIONS"] += ":alloc_dealloc_mismatch=0"
    done = subprocess.run([HEDDLE, "serve", DEMO, "--port", str(free_port()), "--device", "cuda", *args],
                          capture_output=True, text=True, timeout=60, env=env)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("heddle serve:")]
    assert done.returncode == 1 and len(lines) == 1, (done.returncode, done.stdout, done.stderr)
    for word in words:
        assert word in lines[0], f"'{lines[0]}' does not say '{word}'"


def what_cannot_work_is_said_at_once():
    refused("driver=0", words=["CUDA declined: no NVIDIA driver"])
    refused("driver=12040", words=["too old: it offers CUDA 12.4, needs 13.0"])
    refused("sm=75", words=["GPU 0 is sm_75, needs sm_80"])
    refused("devices=1", "--tp", "2", words=["GPU 1 does not exist, the driver sees 1"])
    refused("memory_mb=64", "--max-num-seqs", "64", "--max-num-batched-tokens", "4096",
            words=["the model does not fit: weights 0.01 GiB", "for 1k tokens", "free", "what would fit: "])
    refused("memory_mb=60", "--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--max-model-len", "1024",
            "--kv-cache-bytes", "2M", words=["what would fit: --max-model-len 8", "--kv-cache-dtype int8"])


def without_a_gpu_auto_goes_on():
    for settings, args, why in (("sm=75", [], "GPU 0 is sm_75"), ("devices=1", ["--tp", "2"], "GPU 1 does not exist")):
        with Cuda("--device", "auto", *args, settings=settings) as server:
            check(answers(server), EXPECTED, "on the CPU")
            assert f"device cpu: CUDA declined: {why}" in server.output()


def replicas_have_gpus_of_their_own():
    with Cuda("--dp", "2", settings="devices=2") as server:
        end = time.monotonic() + 20
        while not all(f"cuda, GPU {i}" in server.output() for i in (0, 1)):
            assert time.monotonic() < end, server.output()
            time.sleep(0.05)


if __name__ == "__main__":
    if not os.path.exists(os.path.join(PLUGIN_DIR, "heddle_cuda.so")):
        skip("the emulated CUDA plugin is not built")
    EXPECTED = reference()
    run([one_rank_without_gaps, a_draft_model_changes_nothing, two_ranks_and_a_killed_one, a_fault_costs_time_only, a_hang_costs_time_only,
         what_cannot_work_is_said_at_once, without_a_gpu_auto_goes_on, replicas_have_gpus_of_their_own])
