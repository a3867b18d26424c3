#!/usr/bin/env python3
"""Goal: what cannot work is refused at the start with one line that names it, exit code 1 (2 for
options), and no process is left.

Method: broken copies of a golden model, taken ports, wrong options; what is printed is searched for
the name of the file, tensor or option.
"""
import json
import os
import shutil
import socket
import subprocess
import tempfile

from harness import DEMO, HEDDLE, environment, free_port, run


def attempt(*args, code):
    done = subprocess.run([HEDDLE, *args], capture_output=True, text=True, timeout=60, env=environment())
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{args}: exit code {done.returncode}, not {code}\n{text}"
    assert "Sanitizer" not in text and "assertion failed" not in text, text
    return text


def serve(model, *args, code=1):
    return attempt("serve", model, "--port", str(free_port()), "--tp", "2", *args, code=code)


class Copy:
    """A copy of the demo model to break."""

    def __enter__(self):
        self.dir = tempfile.mkdtemp()
        self.model = os.path.join(self.dir, "model")
        shutil.copytree(DEMO, self.model)
        return self

    def path(self, name):
        return os.path.join(self.model, name)

    def config(self, **changes):
        with open(self.path("config.json")) as f:
            config = json.load(f)
        for key, value in changes.items():
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        with open(self.path("config.json"), "w") as f:
            json.dump(config, f)

    def __exit__(self, *_):
        shutil.rmtree(self.dir)


def no_such_model():
    assert "/nonexistent/model" in serve("/nonexistent/model")


def missing_weights():
    with Copy() as c:
        os.unlink(c.path("model.safetensors"))
        assert "safetensors" in serve(c.model)


def cut_weights():
    with Copy() as c:
        with open(c.path("model.safetensors"), "r+b") as f:
            f.truncate(os.path.getsize(c.path("model.safetensors")) - 1000)
        assert "model.safetensors" in serve(c.model)


def damaged_packed_weights():
    """Packed weights are served from their file at once; what is wrong with them still ends the start."""
    with Copy() as c:
        packed = os.path.join(c.dir, "packed")
        attempt("quantize", c.model, "--format", "int8", "--out", packed, code=0)
        path = os.path.join(packed, "model.safetensors")
        with open(path, "r+b") as f:
            f.seek(os.path.getsize(path) // 2)
            byte = f.read(1)
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte[0] ^ 0x10]))
        text = attempt("serve", packed, "--port", str(free_port()), code=1)
        assert "is damaged: its bytes are not those that were written" in text and "cannot work" in text, text


def wrong_shape():
    with Copy() as c:
        c.config(intermediate_size=100)
        text = serve(c.model)
        assert "mlp" in text and "100" in text, text


def missing_tensor():
    with Copy() as c:
        c.config(num_hidden_layers=99)
        assert "model.layers." in serve(c.model)


def unknown_architecture():
    with Copy() as c:
        c.config(architectures=["MadeUpForCausalLM"])
        assert "MadeUpForCausalLM" in serve(c.model)


def unreadable_tokenizer():
    with Copy() as c:
        with open(c.path("tokenizer.json"), "w") as f:
            f.write("{\"model\": ")
        assert "tokenizer.json" in serve(c.model)


def broken_config():
    with Copy() as c:
        with open(c.path("config.json"), "w") as f:
            f.write("not json")
        assert "config.json" in serve(c.model)


def taken_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        text = attempt("serve", DEMO, "--port", str(s.getsockname()[1]), code=1)
        assert str(s.getsockname()[1]) in text, text


def wrong_options():
    assert "max-num-seqs" in serve(DEMO, "--max-num-seqs", "0", code=2)
    for name, value in (("max-num-queued-reqs", "0"), ("max-num-batched-tokens", "-1"), ("pipeline-depth", "0"),
                        ("watchdog-timeout", "0"), ("max-num-queued-tokens", "many"), ("block-size", "4096")):
        assert name in serve(DEMO, "--" + name, value, code=2)
    assert "did you mean" in serve(DEMO, "--max-num-seq", "4", code=2)
    assert "not supported" in serve(DEMO, "--pipeline-parallel-size", "2", code=2)
    assert "tensor" in attempt("serve", DEMO, "--tp", "65", code=2)
    assert "no verb" in attempt("sevre", DEMO, code=2)
    assert "which model" in attempt("serve", code=1)
    assert "500 words" in serve(DEMO, "--launcher", "mpirun", "--mpirun-args", "-v " * 500)


def worker_without_coordinator():
    text = attempt("worker", DEMO, "--coordinator", f"127.0.0.1:{free_port()}", "--rank", "0", "--replica", "0",
                   "--reconnect-timeout", "1", code=3)
    assert "127.0.0.1" in text, text


if __name__ == "__main__":
    run([no_such_model, missing_weights, cut_weights, damaged_packed_weights, wrong_shape, missing_tensor, unknown_architecture,
         unreadable_tokenizer, broken_config, taken_port, wrong_options, worker_without_coordinator])
