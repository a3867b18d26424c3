#!/usr/bin/env python3
"""Goal: two hosts serve one model: ranks across a network, summing over MPI, started by mpirun.

Method: two network namespaces with their own host names, joined by a bridge, stand for two hosts; the
coordinator runs outside of both. The greedy answer must be the one of two ranks on one host; then the
network of one host is cut, which must be noticed, and restored, after which the cluster serves again.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time

from harness import DEMO, HEDDLE, Server, environment, free_port, run, skip

NET, BRIDGE, OUTSIDE = "10.77.41", "hdlbr", "10.77.41.254"
HOSTS = {"hdlA": f"{NET}.1", "hdlB": f"{NET}.2"}
TOKEN = "token-of-the-namespace-test"
REQUEST = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def sh(*words, check=True):
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)}: {done.stderr}")
    return done.returncode


def take_down():
    for name in HOSTS:
        sh("ip", "link", "del", f"v{name}", check=False)
        sh("ip", "netns", "del", name, check=False)
    sh("ip", "link", "del", BRIDGE, check=False)


def put_up():
    sh("ip", "link", "add", BRIDGE, "type", "bridge")
    sh("ip", "addr", "add", f"{OUTSIDE}/24", "dev", BRIDGE)
    sh("ip", "link", "set", BRIDGE, "up")
    for name, address in HOSTS.items():
        sh("ip", "netns", "add", name)
        sh("ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        sh("ip", "link", "set", f"v{name}", "master", BRIDGE, "up")
        sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        sh("ip", "-n", name, "link", "set", "eth0", "up")
        sh("ip", "-n", name, "link", "set", "lo", "up")


def agent(folder):
    """What mpirun calls instead of ssh: HOST COMMAND…"""
    path = os.path.join(folder, "agent.sh")
    cases = "\n".join(f"  {a}) ns={n} ;;" for n, a in HOSTS.items())
    with open(path, "w") as f:
        f.write("#!/bin/sh\nhost=$1; shift\ncase $host in\n" + cases + "\nesac\n"
                "exec ip netns exec $ns unshare --uts sh -c \"hostname node-$ns; exec sh -c '$*'\"\n")
    os.chmod(path, 0o755)
    return path


def mpirun(folder, coordinator):
    words = ["mpirun", "--mca", "plm", "rsh", "--mca", "plm_rsh_agent", agent(folder),
             "--mca", "oob_tcp_if_include", f"{NET}.0/24", "--mca", "btl_tcp_if_include", f"{NET}.0/24",
             "--host", ",".join(f"{a}:1" for a in HOSTS.values()), "--bind-to", "none",
             "--mca", "mpi_yield_when_idle", "1", "--mca", "pml", "ob1", "--mca", "btl", "self,tcp",
             "-x", "HEDDLE_CLUSTER_TOKEN", "-x", "ASAN_OPTIONS", "-np", "2",
             HEDDLE, "worker", DEMO, "--coordinator", coordinator, "--tp", "2", "--device", "cpu",
             "--collective", "mpi", "--threads", "1"]
    return subprocess.Popen(words, env=dict(environment(), HEDDLE_CLUSTER_TOKEN=TOKEN), stdin=subprocess.DEVNULL)


def answer(server):
    status, body = server.post("/v1/completions", REQUEST)
    assert status == 200, body
    return body["choices"][0]["text"]


def ranks_on_two_hosts():
    with Server(DEMO, "--tp", "2", "--collective", "shm") as one_host:
        expected = answer(one_host)
    folder = tempfile.mkdtemp()
    address = f"{OUTSIDE}:{free_port()}"
    os.environ["HEDDLE_CLUSTER_TOKEN"] = TOKEN
    ranks = None
    try:
        with Server(DEMO, "--tp", "2", "--worker-address", address, verb="coordinator", wait_ready=False) as server:
            time.sleep(1)
            ranks = mpirun(folder, address)
            server.wait_ready(60)
            assert answer(server) == expected
            sh("ip", "link", "set", "vhdlB", "down")
            end = time.monotonic() + 15
            while server.get("/health")[0] == 200 and time.monotonic() < end:
                time.sleep(0.05)
            assert server.get("/health")[0] == 503, "a cut network was not noticed"
            sh("ip", "link", "set", "vhdlB", "up")  # the ranks live on and find each other again
            server.wait_ready(60)
            assert answer(server) == expected
    finally:
        if ranks:
            ranks.terminate()
            ranks.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    if os.geteuid():
        skip("network namespaces need root")
    if not shutil.which("mpirun") or not shutil.which("ip"):
        skip("mpirun or ip is not installed")
    take_down()
    if (sh("ip", "netns", "add", "hdlprobe", check=False) or sh("ip", "-n", "hdlprobe", "link", check=False)
            or sh("ip", "link", "add", BRIDGE, "type", "bridge", check=False)):
        sh("ip", "netns", "del", "hdlprobe", check=False)
        skip("no network namespaces or bridges are granted here")
    take_down()
    sh("ip", "netns", "del", "hdlprobe", check=False)
    try:
        put_up()
        run([ranks_on_two_hosts])
    finally:
        take_down()
    sys.exit(0)
