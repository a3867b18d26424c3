#!/usr/bin/env python3
"""Goal: OpenAI's own Python client, unchanged, gets from a real cluster what it gets from OpenAI.

Method: `heddle serve` with two ranks of a small model with random weights; the client's typed objects are checked, and
the same greedy request must give the same text whole, streamed, by token ids and by /tokenize.
"""
import os
import signal
import threading
import time

from harness import DEMO, GOLDEN, Server, run, skip

try:
    import openai
except ImportError:
    skip("the openai module is not installed (see tests/requirements.txt)")

MODEL = DEMO if os.path.isdir(DEMO) else os.path.join(GOLDEN, "llama")
TEMPLATE = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
            "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")
server = client = None


def greedy(**more):
    return dict({"model": client.models.list().data[0].id, "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}, **more)


def models():
    listed = client.models.list().data
    assert listed and listed[0].object == "model"
    assert client.models.retrieve(listed[0].id).id == listed[0].id
    try:
        client.models.retrieve("nothing")
        assert False, "an unknown model was found"
    except openai.NotFoundError as e:
        assert e.code == "model_not_found", e


def completion_whole_streamed_and_by_ids():
    on = {"ignore_eos": True}  # a small model may have nothing to add
    whole = client.completions.create(**greedy(extra_body=on))
    assert whole.object == "text_completion" and whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    text, usage, chunks = "", None, 0
    for chunk in client.completions.create(**greedy(extra_body=on, stream=True, stream_options={"include_usage": True})):
        chunks += 1
        if chunk.usage:
            usage = chunk.usage
            assert chunk.choices == []
        else:
            text += chunk.choices[0].text
    assert text == whole.choices[0].text, (text, whole.choices[0].text)
    assert usage.completion_tokens == whole.usage.completion_tokens and chunks > 2
    ids = server.post("/tokenize", {"prompt": "Once upon a time"})[1]["tokens"]
    assert len(ids) == whole.usage.prompt_tokens
    again = client.completions.create(**greedy(prompt=ids, extra_body=on))
    assert again.choices[0].text == whole.choices[0].text
    assert server.post("/detokenize", {"tokens": ids})[1]["prompt"].endswith("Once upon a time")


def choices_prompts_and_seeds():
    r = client.completions.create(**greedy(prompt=["a b", "c d e"], n=3, max_tokens=6, temperature=1.0, seed=5))
    assert [c.index for c in r.choices] == list(range(6))
    s = client.completions.create(**greedy(prompt=["a b", "c d e"], n=3, max_tokens=6, temperature=1.0, seed=5))
    assert [c.text for c in r.choices] == [c.text for c in s.choices], "a seed does not repeat"
    assert len({c.text for c in r.choices[:3]}) > 1, "choices of one prompt are all the same"
    best = client.completions.create(**greedy(n=1, best_of=4, temperature=1.0, max_tokens=8))
    assert len(best.choices) == 1


def beams():
    r = client.completions.create(**greedy(n=2, max_tokens=8, extra_body={"use_beam_search": True, "beam_width": 4}))
    assert len(r.choices) == 2 and r.choices[0].text != r.choices[1].text


def logprobs_as_the_harness_reads_them():
    r = client.completions.create(**greedy(max_tokens=3, logprobs=4, echo=True))
    p = r.choices[0].logprobs
    n = r.usage.prompt_tokens + r.usage.completion_tokens
    assert len(p.tokens) == len(p.token_logprobs) == len(p.top_logprobs) == len(p.text_offset) == n
    assert p.token_logprobs[0] is None and all(x <= 0 for x in p.token_logprobs[1:])
    for chosen, top in list(zip(p.token_logprobs, p.top_logprobs))[1:]:
        assert max(top.values()) >= chosen - 1e-4
    for i in range(r.usage.prompt_tokens, n):  # greedy: the chosen token is the best one
        assert abs(max(p.top_logprobs[i].values()) - p.token_logprobs[i]) < 1e-4
    scored = client.completions.create(**greedy(max_tokens=0, logprobs=1, echo=True))
    # how the prompt was cut into steps must not show
    for a, b in zip(scored.choices[0].logprobs.token_logprobs[1:], p.token_logprobs[1:]):
        assert abs(a - b) < 1e-3, (a, b)


def stop_strings():
    text = client.completions.create(**greedy(max_tokens=40)).choices[0].text
    for cut in (text[5:8], text[10:11]):
        if len(cut.encode()) == 0 or "\ufffd" in cut:
            continue
        r = client.completions.create(**greedy(max_tokens=40, stop=[cut]))
        assert r.choices[0].text == text[:text.index(cut)], (cut, r.choices[0].text, text)
        assert r.choices[0].finish_reason == "stop"


def chat():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=12, temperature=0,
                                           logprobs=True, top_logprobs=2)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.refusal is None
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    assert len(tokens[0].top_logprobs) == 2 and tokens[0].logprob <= 0
    text, roles = "", []
    for chunk in client.chat.completions.create(model=model, messages=messages, max_completion_tokens=12, temperature=0, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        roles += [delta.role] if delta.role else []
    assert text == message.content and roles == ["assistant"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    client.chat.completions.create(model=model, messages=messages, tools=[tool], max_completion_tokens=2)


def refusals():
    model = client.models.list().data[0].id
    for more, words in (({"temperature": 3}, "temperature"), ({"max_tokens": 10 ** 8}, "context"), ({"n": 10 ** 6}, "'n'"),
                        ({"prompt": [10 ** 7]}, "prompt"), ({"suffix": "x"}, "suffix"), ({"logit_bias": {"99999999": 1}}, "logit_bias")):
        try:
            client.completions.create(**greedy(**more))
            assert False, f"{more} was accepted"
        except openai.BadRequestError as e:
            assert words in str(e), (more, e)
    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x"}], response_format={"type": "json_object"})
        assert False, "json_object was accepted"
    except openai.BadRequestError as e:
        assert "response_format" in str(e)


def held_blocks():
    return [s for s in server.get("/metrics")[1].splitlines() if s.startswith("heddle:kv_blocks{") and '"held"' in s][0]


def leaving_frees_the_request():
    stream = client.completions.create(**greedy(max_tokens=200, stream=True, extra_body={"ignore_eos": True}))
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 5
    while server.metric("vllm:num_requests_running") or server.metric("heddle:streams"):
        assert time.monotonic() < end, "the request goes on without its client"
        time.sleep(0.02)
    while not held_blocks().endswith(" 0"):  # freed once the last plan that named them is acknowledged
        assert time.monotonic() < end, held_blocks()
        time.sleep(0.02)


def many_at_once():
    expected = client.completions.create(**greedy()).choices[0].text
    wrong = []

    def one():
        text = client.completions.create(**greedy()).choices[0].text
        if text != expected:
            wrong.append(text)
    threads = [threading.Thread(target=one) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, f"who shares the batch changes the text: {wrong[0]!r} instead of {expected!r}"


def metrics_count():
    before = server.metric("vllm:generation_tokens_total")
    r = client.completions.create(**greedy(max_tokens=10, extra_body={"ignore_eos": True}))
    assert r.usage.completion_tokens == 10
    end = time.monotonic() + 2  # the numbers are at most a step old
    while server.metric("vllm:generation_tokens_total") < before + 10 and time.monotonic() < end:
        time.sleep(0.02)
    assert server.metric("vllm:generation_tokens_total") >= before + 10, "tokens not counted"
    assert server.metric("vllm:time_to_first_token_seconds_count") >= 1


def drains_on_sigterm():
    got, done = [], []

    def long():
        for chunk in client.completions.create(**greedy(max_tokens=120, n=2, stream=True, extra_body={"ignore_eos": True})):
            got.append(chunk)
        done.append(True)
    t = threading.Thread(target=long)
    t.start()
    while len(got) < 3:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    status = []
    while not done and (503, 200) not in status:
        status.append((server.get("/health", 30)[0], server.get("/live", 30)[0]))
    t.join(120)
    finished = [c for c in got if c.choices and c.choices[0].finish_reason == "length"]
    assert done and len(finished) == 2, "a request in flight was cut"
    assert (503, 200) in status, status
    server.process.wait(40)
    assert server.process.returncode == 0, server.output()
    assert "starting again" not in server.output(), "ranks that were told to leave were started again"


def main():
    global server, client
    import tempfile
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(TEMPLATE)
        template.flush()
        with Server(MODEL, "--tp", "2", "--threads", "1", "--chat-template", template.name, "--shutdown-timeout", "120") as server:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=60)
            run([models, completion_whole_streamed_and_by_ids, choices_prompts_and_seeds, logprobs_as_the_harness_reads_them,
                 stop_strings, chat, refusals, leaving_frees_the_request, many_at_once, metrics_count, beams, drains_on_sigterm])


main()
