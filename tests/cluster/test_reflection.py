#!/usr/bin/env python3
"""Goal: a client that knows nothing but the port finds the services by reflection and calls them;
gRPC's own health client understands us; the C client's example runs.

Method: grpcio-reflection and grpcio-health-checking against `heddle serve --grpc-port`.
"""
import os
import subprocess

from harness import BINARY_DIR, DEMO, GOLDEN, Server, environment, free_port, run, skip

try:
    import grpc
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
except ImportError:
    skip("grpcio-reflection and grpcio-health-checking are not installed (see tests/requirements.txt)")

MODEL = DEMO if os.path.isdir(DEMO) else os.path.join(GOLDEN, "llama")
port = free_port()
channel = None


def services_are_found_and_called():
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert services == {"heddle.v1.Heddle", "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection",
                        "grpc.reflection.v1alpha.ServerReflection"}, services
    pool = DescriptorPool(database)
    heddle = pool.FindServiceByName("heddle.v1.Heddle")
    assert [m.name for m in heddle.methods] == ["Generate", "Cancel", "Tokenize", "Detokenize", "ModelInfo"]
    sampling = pool.FindMessageTypeByName("heddle.v1.SamplingParams")
    assert sampling.fields_by_name["temperature"].containing_oneof is not None
    tokenize = heddle.methods_by_name["Tokenize"]
    request = GetMessageClass(tokenize.input_type)(text="Once upon a time")
    reply_class = GetMessageClass(tokenize.output_type)
    reply = channel.unary_unary("/heddle.v1.Heddle/Tokenize", lambda m: m.SerializeToString(), reply_class.FromString)(request)
    assert len(reply.ids) > 1, reply
    for name in ("nothing.Here", "heddle.cluster.Cluster"):
        try:
            pool.FindMessageTypeByName(name)
            assert False, name
        except KeyError:
            pass


def health_client():
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", "liveness", "readiness", "heddle.v1.Heddle"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
    try:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert False
    except grpc.RpcError as e:
        assert e.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    if hasattr(stub, "List"):
        statuses = stub.List(health_pb2.HealthListRequest()).statuses
        assert {k: v.status for k, v in statuses.items()}["readiness"] == health_pb2.HealthCheckResponse.SERVING


def compressed_requests():
    gzip = grpc.insecure_channel(f"127.0.0.1:{port}", compression=grpc.Compression.Gzip,
                                 options=[("grpc.max_send_message_length", -1)])
    stub = health_pb2_grpc.HealthStub(gzip)
    assert stub.Check(health_pb2.HealthCheckRequest(service="heddle.v1.Heddle")).status == health_pb2.HealthCheckResponse.SERVING
    # A small message that would become huge is refused, and the server does not grow by it.
    before = memory_peak_mib()
    raw = gzip.unary_unary("/grpc.health.v1.Health/Check")
    for n in (32 << 20, 200 << 20):
        try:
            raw(b"\0" * n)
            assert False, "a bomb was taken"
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, e
    assert memory_peak_mib() - before < 250, (before, memory_peak_mib())
    gzip.close()


def memory_peak_mib():
    with open(f"/proc/{server.process.pid}/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) // 1024


def c_client():
    program = os.path.join(BINARY_DIR, "example_client")
    if not os.path.exists(program):
        return
    done = subprocess.run([program, f"127.0.0.1:{port}", "Once upon a time"], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done
    assert "1 of 1 groups ready" in done.stdout and ("[stop:" in done.stdout or "[length:" in done.stdout), done
    done = subprocess.run([program, "127.0.0.1:1", "x"], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "status 14" in done.stderr, done


server = Server(MODEL, "--grpc-port", str(port), "--tp", "1", "--threads", "1")
try:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    grpc.channel_ready_future(channel).result(timeout=20)
    run([services_are_found_and_called, health_client, compressed_requests, c_client])
finally:
    server.stop()
