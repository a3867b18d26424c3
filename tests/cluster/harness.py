"""Starts real clusters for the tests in this folder, and speaks HTTP to them with the standard
library alone. A test prints why and leaves with 77 when it cannot run here."""
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
BINARY_DIR = os.environ.get("HEDDLE_BINARY_DIR", os.path.join(ROOT, "build", "dev"))
HEDDLE = os.path.join(BINARY_DIR, "heddle")
DEMO = os.path.join(ROOT, "models", "demo")
GOLDEN = os.path.join(ROOT, "tests", "golden")


def first_layers(model, folder, n_layers):
    """A model folder with the first layers of another one."""
    os.makedirs(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(os.path.join(model, name), folder)
    with open(os.path.join(model, "config.json")) as f:
        config = json.load(f)
    config["num_hidden_layers"] = n_layers
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    with open(os.path.join(model, "model.safetensors"), "rb") as f:
        data = f.read()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header, kept, blob = json.loads(data[8:end]), {}, b""
    for name, tensor in header.items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "0"
        if name == "__metadata__" or int(layer) >= n_layers:
            continue
        a, b = tensor["data_offsets"]
        kept[name] = dict(tensor, data_offsets=[len(blob), len(blob) + b - a])
        blob += data[end + a:end + b]
    text = json.dumps(kept).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + blob)


def skip(why):
    print("skipped:", why)
    sys.exit(77)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment():
    env = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    # mpirun itself leaks, and leaks of a rank that was killed are not news
    env["ASAN_OPTIONS"] = env.get("ASAN_OPTIONS", "") + ":detect_leaks=0"
    return env


class Server:
    """`heddle serve MODEL …` on a free port, until stop()."""

    def __init__(self, model=DEMO, *args, wait_s=120, verb="serve", wait_ready=True):
        self.port = free_port()
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)
        self.process = subprocess.Popen(
            [HEDDLE, verb, model, "--port", str(self.port), *args],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment())
        if wait_ready:
            self.wait_ready(wait_s)

    def wait_ready(self, wait_s=120):
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the server left with {self.process.returncode}\n{self.output()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {wait_s} s\n{self.output()}")

    def output(self):
        with open(self.log.name, errors="replace") as f:
            return f.read()[-6000:]

    def connection(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path, timeout=10):
        c = self.connection(timeout)
        c.request("GET", path)
        r = c.getresponse()
        body = r.read().decode()
        c.close()
        return r.status, body

    def post(self, path, body, timeout=120):
        c = self.connection(timeout)
        c.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        r = c.getresponse()
        text = r.read().decode()
        c.close()
        return r.status, json.loads(text)

    def stream(self, path, body, timeout=120):
        """Yields the events of a stream; the connection closes with the generator."""
        c = self.connection(timeout)
        try:
            c.request("POST", path, json.dumps(dict(body, stream=True)), {"Content-Type": "application/json"})
            r = c.getresponse()
            if r.status != 200:
                raise AssertionError(f"{r.status} {r.read().decode()}")
            for line in r:
                line = line.decode().rstrip("\r\n")
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line[6:])
            raise AssertionError("the stream ended without [DONE]")
        finally:
            c.close()

    def metric(self, name):
        """Sum of a metric's samples."""
        total, found = 0.0, False
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + "{") or line.startswith(name + " "):
                total, found = total + float(line.rsplit(" ", 1)[1]), True
        assert found, f"no metric {name}"
        return total

    def workers(self):
        """Process ids of the worker ranks below this server, by rank order of their start."""
        found, parents = [], {self.process.pid}
        for _ in range(4):
            for entry in os.listdir("/proc"):
                if not entry.isdigit() or int(entry) in parents:
                    continue
                with contextlib.suppress(OSError):
                    with open(f"/proc/{entry}/stat") as f:
                        parent = int(f.read().rsplit(")", 1)[1].split()[1])
                    if parent in parents:
                        parents.add(int(entry))
        for pid in sorted(parents - {self.process.pid}):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    words = f.read().split(b"\0")
                if os.path.basename(words[0]) == b"heddle" and words[1:2] == [b"worker"]:
                    found.append(pid)
        return found

    def stop(self, how=signal.SIGTERM, wait_s=30):
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(wait_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"did not stop within {wait_s} s\n{self.output()}")
        return self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            print(self.output())
        try:
            self.stop()
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self.log.name)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def run(tests):
    """Runs functions by name, says which failed, ends with the plain closing line."""
    failed = 0
    for test in tests:
        started = time.monotonic()
        try:
            test()
            print(f"ok   {test.__name__} {time.monotonic() - started:.1f} s", flush=True)
        except AssertionError as e:
            failed += 1
            print(f"FAIL {test.__name__}: {e}", flush=True)
    print(f"{len(tests) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)
