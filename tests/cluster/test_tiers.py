#!/usr/bin/env python3
"""Goal: a working set larger than the device costs time, never a letter: what the device forgets comes
back from host memory and disk, and what does not come back is computed again.

Method: conversations with a common beginning, turn by turn, on a server that holds all of them and on
one whose device, host memory and disk are each too small for them. Texts must be equal while blocks
come from both tiers, while the file is overwritten behind the rank's back, and while a rank is killed.
"""
import os
import signal
import tempfile
import threading

from harness import DEMO, Server, run

CONVERSATIONS, TURNS = 8, 3
LIMITS = ["--max-model-len", "480", "--max-num-seqs", "4", "--block-size", "16", "--tp", "2", "--kv-offload", "always"]


def words(seed, n):
    """Plain English words, the same for the same seed."""
    table = ("the king said to his son that he would give the golden bird for a good horse and go home "
             "into a dark wood where an old fox sat by the river under three tall trees").split()
    out = []
    for _ in range(n):
        seed = (seed * 1103515245 + 12345) % 2**31
        out.append(table[(seed >> 16) % len(table)])
    return " ".join(out)


def ask(server, prompt):
    status, r = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, "temperature": 0,
                                                "ignore_eos": True})
    assert status == 200, r
    return r["choices"][0]["text"], r["usage"]["prompt_tokens_details"]["cached_tokens"]


def converse(server, between=None):
    """All turns of all conversations, two at a time; the answers and the cached tokens of each turn."""
    shared = words(1, 60)
    prompts = [f"{shared} {words(100 + c, 110)}" for c in range(CONVERSATIONS)]
    answers, cached = [[] for _ in prompts], [0] * TURNS

    def turn(c, t):
        text, n = ask(server, prompts[c])
        answers[c].append(text)
        prompts[c] += text + " " + words(1000 * t + c, 20)
        cached[t] += n

    for t in range(TURNS):
        for c in range(0, CONVERSATIONS, 2):
            threads = [threading.Thread(target=turn, args=(k, t)) for k in (c, c + 1)]
            for x in threads:
                x.start()
            for x in threads:
                x.join()
            if between:
                between(t, c)
    return answers, cached


def sample(server, name, *labels):
    for line in server.get("/metrics")[1].splitlines():
        if line.startswith(name + "{") and all(label in line for label in labels):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no {name} with {labels}")


def files_of(server):
    """The nameless files of the ranks."""
    for pid in server.workers():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            try:
                if FOLDER.name in os.readlink(path):
                    yield path
            except OSError:
                continue


def overwrite(server):
    n = 0
    for path in files_of(server):
        with open(path, "r+b", buffering=0) as f:
            size, n = os.path.getsize(path), n + 1
            f.write(b"\x5a" * size)
    assert n == 2, f"{n} files"


def same_letters_from_host_and_disk():
    losses, was = None, 0
    while losses != was:  # a group lost to a stalled machine forgets all blocks: then once more
        was = SMALL.metric("heddle:group_losses_total")
        answers, cached = converse(SMALL)
        losses = SMALL.metric("heddle:group_losses_total")
    assert answers == EXPECTED[0], f"expected {EXPECTED[0]}\ngot      {answers}"
    host = sample(SMALL, "heddle:kv_tier_hit_tokens_total", 'tier="host"')
    disk = sample(SMALL, "heddle:kv_tier_hit_tokens_total", 'tier="disk"')
    print(f"     cached {cached} of {EXPECTED[1]} by turn, {host:.0f} tokens from host, {disk:.0f} from disk")
    assert host > 200 and disk > 100, (host, disk)
    assert cached[2] > 0.4 * EXPECTED[1][2], (cached, EXPECTED[1])
    for kind in ("save", "load", "spill", "fetch"):
        assert sample(SMALL, "heddle:kv_moves_total", f'kind="{kind}"') > 0, kind
        assert sample(SMALL, "heddle:kv_move_bytes_total", f'kind="{kind}"') > 0, kind
    assert not os.listdir(FOLDER.name), "a file has a name"


def an_overwritten_file_gives_no_wrong_letter():
    assert converse(SMALL, lambda t, c: c or overwrite(SMALL))[0] == EXPECTED[0]
    assert sample(SMALL, "heddle:kv_move_failures_total", 'kind="fetch"') > 0


def a_killed_rank_loses_blocks_only():
    def kill(t, c):
        if t == 1 and c == 2:
            threading.Thread(target=lambda: os.kill(SMALL.workers()[-1], signal.SIGKILL)).start()

    assert converse(SMALL, kill)[0] == EXPECTED[0]
    assert SMALL.metric("heddle:group_losses_total") >= 1


def what_cannot_be_is_said_at_start():
    for args, word in ((["--kv-disk", "/nowhere/at/all", "--kv-disk-space", "1M", "--swap-bytes", "1M"], "/nowhere/at/all"),
                       (["--kv-disk", FOLDER.name, "--kv-disk-space", "1M"], "--swap-bytes")):
        server = Server(DEMO, *args, "--restarts-max", "0", wait_ready=False)
        server.process.wait(30)
        assert server.process.returncode != 0 and word in server.output(), server.output()
        os.unlink(server.log.name)


if __name__ == "__main__":
    FOLDER = tempfile.TemporaryDirectory()
    with Server(DEMO, *LIMITS) as big:
        EXPECTED = converse(big)
    with Server(DEMO, *LIMITS, "--num-blocks-override", "48", "--swap-bytes", "960K",
                "--kv-disk", FOLDER.name, "--kv-disk-space", "8M") as SMALL:
        run([same_letters_from_host_and_disk, an_overwritten_file_gives_no_wrong_letter,
             a_killed_rank_loses_blocks_only, what_cannot_be_is_said_at_start])
