#!/usr/bin/env python3
"""Goal: a gRPC client in another language, with code made from serve.proto, gets the same tokens as HTTP.

Method: grpcio against `heddle serve --grpc-port`; code is generated into a temporary folder.
"""
import os
import subprocess
import sys
import tempfile
import time

from harness import DEMO, GOLDEN, ROOT, Server, free_port, run, skip

try:
    import grpc
    import grpc_tools  # noqa: F401
except ImportError:
    skip("the grpcio and grpcio-tools modules are not installed (see tests/requirements.txt)")

folder = tempfile.TemporaryDirectory()
subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}", f"--python_out={folder.name}",
                f"--grpc_python_out={folder.name}", os.path.join(ROOT, "proto", "serve.proto")], check=True)
sys.path.insert(0, folder.name)
from proto import serve_pb2 as pb  # noqa: E402
from proto import serve_pb2_grpc as rpc  # noqa: E402

MODEL = DEMO if os.path.isdir(DEMO) else os.path.join(GOLDEN, "llama")
server = stub = channel = None


def request(**more):
    sampling = pb.SamplingParams(temperature=0, max_tokens=20)
    fields = {"text": "Once upon a time", "sampling": sampling}
    fields.update(more)
    return pb.GenerateRequest(**fields)


def same_text_as_http():
    replies = list(stub.Generate(request()))
    text = "".join(r.text for r in replies)
    status, body = server.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0})
    assert status == 200 and body["choices"][0]["text"] == text, (text, body)
    last = replies[-1]
    assert last.finish_reason == body["choices"][0]["finish_reason"]
    assert last.prompt_tokens == body["usage"]["prompt_tokens"]
    assert last.completion_tokens == body["usage"]["completion_tokens"] == sum(len(r.tokens) for r in replies)
    ids = stub.Tokenize(pb.TokenizeRequest(text="Once upon a time", add_special_tokens=True)).ids
    by_ids = list(stub.Generate(pb.GenerateRequest(tokens=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(temperature=0, max_tokens=20))))
    assert "".join(r.text for r in by_ids) == text
    assert stub.Detokenize(pb.DetokenizeRequest(ids=ids)).text.endswith("Once upon a time")


def logprobs_and_choices():
    sampling = pb.SamplingParams(temperature=1, max_tokens=5, seed=3, choices=2, logprobs=3, ignore_eos=True)
    replies = list(stub.Generate(request(sampling=sampling)))
    assert {r.choice for r in replies} == {0, 1}
    for r in replies:
        assert len(r.logprobs) == len(r.tokens)
        for chosen, token in zip(r.logprobs, r.tokens):
            assert chosen.chosen.token == token and chosen.chosen.logprob <= 0 and len(chosen.top) == 3
    assert sum(len(r.tokens) for r in replies) == 10


def errors():
    for bad in (request(text="x", model="nothing"), request(sampling=pb.SamplingParams(temperature=-1)),
                pb.GenerateRequest(sampling=pb.SamplingParams(max_tokens=1)), pb.GenerateRequest(tokens=pb.TokenIds(ids=[1 << 30])),
                request(sampling=pb.SamplingParams(max_tokens=1 << 30)), request(sampling=pb.SamplingParams(top_p=float("nan")))):
        try:
            list(stub.Generate(bad))
            assert False, f"accepted: {bad}"
        except grpc.RpcError as e:
            assert e.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND), e
            assert e.details(), e


def cancels():
    long = pb.SamplingParams(temperature=1, max_tokens=200, ignore_eos=True)
    call = stub.Generate(request(sampling=long, request_id="one"))
    next(call)
    assert stub.Cancel(pb.CancelRequest(request_id="one")).found
    assert list(call)[-1].finish_reason == "cancelled"
    assert not stub.Cancel(pb.CancelRequest(request_id="one")).found
    call = stub.Generate(request(sampling=long))
    next(call)
    call.cancel()
    end = time.monotonic() + 5
    while server.metric("vllm:num_requests_running"):
        assert time.monotonic() < end, "the request goes on without its client"
        time.sleep(0.02)
    try:
        list(stub.Generate(request(sampling=long), timeout=0.05))
        assert False, "the deadline was not kept"
    except grpc.RpcError as e:
        assert e.code() == grpc.StatusCode.DEADLINE_EXCEEDED, e


def info_and_health():
    info = stub.ModelInfo(pb.ModelInfoRequest())
    assert info.groups_ready == info.groups == 1 and info.tensor_parallel == 2 and info.context_max > 0
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"") == b"\x08\x01" and check(b"\x0a\x09readiness") == b"\x08\x01"
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
    assert next(watch) == b"\x08\x01"
    watch.cancel()


def keys_are_asked_for():
    port = free_port()
    with Server(MODEL, "--tp", "1", "--threads", "1", "--grpc-port", str(port), "--api-key", "secret") as guarded:
        assert guarded.get("/v1/models")[0] == 401
        with grpc.insecure_channel(f"127.0.0.1:{port}") as ch:
            guarded_stub = rpc.HeddleStub(ch)
            for metadata, known in ((None, False), ((("authorization", "Bearer wrong"),), False), ((("authorization", "Bearer secret"),), True)):
                try:
                    guarded_stub.ModelInfo(pb.ModelInfoRequest(), metadata=metadata)
                    assert known, "no key was asked for"
                except grpc.RpcError as e:
                    assert not known and e.code() == grpc.StatusCode.UNAUTHENTICATED, e
            assert ch.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"


def main():
    global server, stub, channel
    port = free_port()
    with Server(MODEL, "--tp", "2", "--threads", "1", "--grpc-port", str(port)) as server:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        stub = rpc.HeddleStub(channel)
        run([same_text_as_http, logprobs_and_choices, errors, cancels, info_and_health, keys_are_asked_for])


main()
