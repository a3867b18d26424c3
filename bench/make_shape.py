#!/usr/bin/env python3
"""Makes a model folder of a real model's shape without its weights, for --load-format dummy; and the
same shape with random weights as GGUF for peers that read only that.

usage: bench/make_shape.py NAME DIR            config.json and a synthetic tokenizer
       bench/make_shape.py NAME DIR weights    and model.safetensors, bf16 (needs numpy)
       bench/make_shape.py NAME FILE.gguf      bf16 weights (needs numpy)
"""
import json
import os
import struct
import sys

#        architecture, layers, hidden, heads, kv heads, head size, feed-forward, vocabulary, tied, qkv bias, theta, context
SHAPES = {
    "qwen2.5-0.5b": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, True, 1e6, 32768),
    "llama-3.2-1b": ("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, False, 5e5, 131072),
    "tinyllama-1.1b": ("llama", 22, 2048, 32, 4, 64, 5632, 32000, False, False, 1e4, 2048),
    "llama-3.1-8b": ("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, False, 5e5, 131072),
}
CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def byte_alphabet():
    """The characters that byte-level BPE writes for the 256 bytes."""
    shown = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    codes, extra = dict(zip(shown, shown)), 256
    for byte in range(256):
        if byte not in codes:
            codes[byte], extra = extra, extra + 1
    return [chr(codes[b]) for b in range(256)]


def vocabulary(size):
    return byte_alphabet() + [f"\u0120t{i}" for i in range(256, size - 2)] + ["<|bos|>", "<|eos|>"]


def make_folder(name, folder):
    arch, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied, _, theta, context = SHAPES[name]
    os.makedirs(folder, exist_ok=True)
    config = {
        "architectures": [CLASSES[arch]], "model_type": arch, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": ffn, "vocab_size": vocab, "tie_word_embeddings": tied, "rope_theta": theta,
        "max_position_embeddings": context, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": vocab - 2, "eos_token_id": vocab - 1,
    }
    tokens = vocabulary(vocab)
    added = [{"id": vocab - 2 + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, t in enumerate(tokens[-2:])]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": {t: i for i, t in enumerate(tokens[:-2])}, "merges": []},
    }
    for file, value in (("config.json", config), ("tokenizer.json", tokenizer),
                        ("tokenizer_config.json", {"eos_token": "<|eos|>", "bos_token": "<|bos|>", "add_bos_token": False})):
        with open(os.path.join(folder, file), "w") as f:
            json.dump(value, f)


U32, F32, BOOL, STR, ARRAY, I32 = 4, 6, 7, 8, 9, 5
TYPE_F32, TYPE_BF16, ALIGN = 0, 30, 32


def gguf_string(s):
    return struct.pack("<Q", len(s.encode())) + s.encode()


def gguf_value(key, kind, value):
    head = gguf_string(key) + struct.pack("<I", kind)
    if kind == STR:
        return head + gguf_string(value)
    if kind == ARRAY:
        item, values = value
        body = b"".join(gguf_string(v) for v in values) if item == STR else struct.pack(f"<{len(values)}i", *values)
        return head + struct.pack("<IQ", item, len(values)) + body
    return head + struct.pack({U32: "<I", F32: "<f", BOOL: "<B"}[kind], value)


def gguf_tensors(shape):
    arch, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied, bias, _, _ = shape
    yield "token_embd.weight", (vocab, hidden)
    for i in range(layers):
        at = f"blk.{i}."
        yield at + "attn_norm.weight", (hidden,)
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{at}attn_{part}.weight", (rows * head_dim, hidden)
            if bias:
                yield f"{at}attn_{part}.bias", (rows * head_dim,)
        yield at + "attn_output.weight", (hidden, heads * head_dim)
        yield at + "ffn_norm.weight", (hidden,)
        yield at + "ffn_gate.weight", (ffn, hidden)
        yield at + "ffn_up.weight", (ffn, hidden)
        yield at + "ffn_down.weight", (hidden, ffn)
    yield "output_norm.weight", (hidden,)
    if not tied:
        yield "output.weight", (vocab, hidden)


def gguf_header(name, shape):
    arch, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, _, _, theta, context = shape
    numbers = {"context_length": context, "embedding_length": hidden, "block_count": layers, "feed_forward_length": ffn,
               "attention.head_count": heads, "attention.head_count_kv": kv_heads, "vocab_size": vocab,
               "rope.dimension_count": head_dim}
    values = [gguf_value("general.architecture", STR, arch), gguf_value("general.name", STR, name),
              gguf_value("general.file_type", U32, 32)]
    values += [gguf_value(f"{arch}.{k}", U32, v) for k, v in numbers.items()]
    values += [gguf_value(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-6), gguf_value(f"{arch}.rope.freq_base", F32, theta),
               gguf_value("tokenizer.ggml.model", STR, "gpt2"), gguf_value("tokenizer.ggml.pre", STR, "gpt-2"),
               gguf_value("tokenizer.ggml.tokens", ARRAY, (STR, vocabulary(vocab))),
               gguf_value("tokenizer.ggml.token_type", ARRAY, (I32, [1] * (vocab - 2) + [3, 3])),
               gguf_value("tokenizer.ggml.merges", ARRAY, (STR, ["\u0120 t", "a b"])),
               gguf_value("tokenizer.ggml.bos_token_id", U32, vocab - 2),
               gguf_value("tokenizer.ggml.eos_token_id", U32, vocab - 1),
               gguf_value("tokenizer.ggml.add_bos_token", BOOL, 0)]
    return values


def make_gguf(name, path):
    import numpy as np
    shape = SHAPES[name]
    tensors, values, infos, offset = list(gguf_tensors(shape)), gguf_header(name, shape), [], 0
    for tensor, dims in tensors:
        bytes_each = 2 if len(dims) == 2 else 4
        infos.append(gguf_string(tensor) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in reversed(dims))
                     + struct.pack("<IQ", TYPE_BF16 if len(dims) == 2 else TYPE_F32, offset))
        offset += -(-int(np.prod(dims)) * bytes_each // ALIGN) * ALIGN
    random = np.random.default_rng(1)
    with open(path, "wb") as f:
        f.write(struct.pack("<IIQQ", 0x46554747, 3, len(tensors), len(values)) + b"".join(values) + b"".join(infos))
        f.write(b"\0" * (-f.tell() % ALIGN))
        for tensor, dims in tensors:
            if len(dims) == 2:
                rows = max(1, (1 << 24) // dims[1])
                for at in range(0, dims[0], rows):
                    x = random.standard_normal((min(rows, dims[0] - at), dims[1]), dtype=np.float32) / np.float32(dims[1] ** 0.5)
                    f.write(((x.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes())
            else:
                f.write(np.ones(dims, np.float32).tobytes() if "norm" in tensor else np.zeros(dims, np.float32).tobytes())
            f.write(b"\0" * (-f.tell() % ALIGN))


def checkpoint_tensors(shape):
    arch, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, tied, bias, _, _ = shape
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (hidden,)
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield f"{at}self_attn.{part}_proj.weight", (rows * head_dim, hidden)
            if bias:
                yield f"{at}self_attn.{part}_proj.bias", (rows * head_dim,)
        yield at + "self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate_proj.weight", (ffn, hidden)
        yield at + "mlp.up_proj.weight", (ffn, hidden)
        yield at + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (vocab, hidden)


def make_weights(name, folder):
    import numpy as np
    tensors, header, at = list(checkpoint_tensors(SHAPES[name])), {}, 0
    for tensor, dims in tensors:
        n = 2 * int(np.prod(dims))
        header[tensor] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + n]}
        at += n
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 64)
    random = np.random.default_rng(1)
    block = (random.standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)).view(np.uint32)
    block = ((block + 0x8000) >> 16).astype(np.uint16).tobytes()
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(raw)) + raw)
        for tensor, dims in tensors:
            rest = 2 * int(np.prod(dims))
            if len(dims) == 1:
                f.write((b"\x80\x3f" if "norm" in tensor else b"\0\0") * dims[0])
                continue
            while rest:
                f.write(block[:rest])
                rest -= min(rest, len(block))


if __name__ == "__main__":
    if sys.argv[3:] == ["weights"] and sys.argv[1] in SHAPES:
        make_folder(*sys.argv[1:3])
        make_weights(*sys.argv[1:3])
        sys.exit()
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__ + "names: " + " ".join(SHAPES))
    (make_gguf if sys.argv[2].endswith(".gguf") else make_folder)(*sys.argv[1:])
