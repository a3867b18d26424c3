"""Makes the 4-bit goldens of tests/golden: tiny checkpoints in the layouts of GPTQ, AWQ and
compressed-tensors, and what transformers computes from the weights that they stand for.

    python3 tools/golden_quant.py [--out tests/golden] [--only NAME ...]

Codes, zero points and scales are drawn at random; a matrix is (code - zero) * scale in f32, written
to a plain checkpoint beside, which transformers reads. golden.json also has, for each matrix, a sum
over its bits that says whether a reader found exactly these weights. The packing here is written
from the public descriptions of the layouts and gave the same bytes as the packing code of AutoGPTQ,
autoawq 0.2.9 and compressed-tensors 0.20.0.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from golden_models import LLAMA, QWEN2
from make_golden import experts_split, golden_write, json_write, weights_random

LLAMA_128 = dict(
    LLAMA,
    vocab_size=160,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    head_dim=32,
    torch_dtype="float16",
)
QWEN2_128 = dict(
    QWEN2,
    vocab_size=160,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    torch_dtype="float16",
)
MIXTRAL_128 = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
# name: model, method, group (0 = all inputs), zero points, input order, and what is special
CASES = {
    "gptq": (dict(LLAMA_128, num_hidden_layers=2), "gptq", 128, False, False, {}),
    "gptq_zeros": (LLAMA_128, "gptq", 64, True, False, {}),
    "gptq_v2": (LLAMA_128, "gptq_v2", 32, True, False, {}),
    "gptq_order": (dict(LLAMA_128, num_hidden_layers=2), "gptq", 64, True, True, {}),
    "gptq_channel": (QWEN2_128, "gptq", 0, False, False, {}),
    "gptq_order_head": (QWEN2_128, "gptq", 128, False, True, {"tie": False, "head": True}),
    "gptq_mixed": (LLAMA_128, "gptq", 128, False, False, {"plain": ["k_proj", "down_proj"]}),
    "gptq_experts": (MIXTRAL_128, "gptq", 32, True, False, {}),
    "awq": (LLAMA_128, "awq", 128, True, False, {}),
    "awq_bias": (QWEN2_128, "awq", 64, True, False, {}),
    "packed4": (dict(LLAMA_128, torch_dtype="bfloat16"), "ct", 128, False, False, {}),
    "packed4_zeros": (dict(LLAMA_128, torch_dtype="bfloat16"), "ct", 32, True, False, {}),
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def nibbles_pack(x, order=range(8)):
    """[..., 8n] values of four bits to [..., n] words; entry i of `order` lies in bits 4i."""
    words = np.zeros((*x.shape[:-1], x.shape[-1] // 8), np.uint32)
    for place, which in enumerate(order):
        words |= x[..., which::8].astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def matrix_draw(rand, n_out, n_in, method, group, zeros, order):
    """Codes [out, in], zeros and scales [out, groups], group of each input."""
    size = group or n_in
    groups = n_in // size
    codes = rand.integers(0, 16, (n_out, n_in))
    zero = rand.integers(0, 16, (n_out, groups)) if zeros else np.full((n_out, groups), 8)
    zero = np.where(rand.random((n_out, groups)) < 0.7, zero // 4 + 6, zero) if zeros else zero
    scale = torch.from_numpy((0.025 * 2 ** rand.uniform(-1, 1, (n_out, groups))).astype("f4"))
    scale = scale.bfloat16() if method == "ct" else scale.half()
    g_idx = np.arange(n_in) // size
    if order:
        g_idx = g_idx[rand.permutation(n_in)]
    return codes, zero, scale, g_idx


def matrix_pack(method, codes, zero, scale, g_idx):
    if method == "ct":
        parts = {
            "weight_packed": nibbles_pack(codes),
            "weight_scale": scale.contiguous(),
            "weight_shape": torch.tensor(codes.shape),
        }
        if (zero != 8).any():
            parts["weight_zero_point"] = nibbles_pack(zero.T).T.contiguous()
        return parts
    parts = {"scales": scale.T.contiguous()}
    if method == "awq":
        parts["qweight"] = nibbles_pack(codes.T, AWQ_ORDER)
        parts["qzeros"] = nibbles_pack(zero.T, AWQ_ORDER)
        return parts
    stored = zero if method == "gptq_v2" else (zero - 1) & 15
    parts["qweight"] = nibbles_pack(codes).T.contiguous()
    parts["qzeros"] = nibbles_pack(stored.T)
    parts["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    return parts


def config_quantized(config, method, group, zeros, order):
    size = group or -1
    if method == "awq":
        q = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
        q |= {"version": "gemm", "modules_to_not_convert": None}
    elif method == "ct":
        weights = {"num_bits": 4, "type": "int", "symmetric": not zeros, "strategy": "group"}
        weights |= {"group_size": size, "actorder": None, "dynamic": False}
        group_0 = {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
        q = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
        q |= {"config_groups": {"group_0": dict(group_0, weights=weights)}, "kv_cache_scheme": None}
    else:
        q = {"quant_method": "gptq", "bits": 4, "group_size": size, "desc_act": order}
        q |= {"sym": not zeros, "checkpoint_format": method}
    return dict(config, quantization_config=q)


def bits_sum(weights):
    """Sum of bits(w[i]) * (2 i + 1) modulo 2^64 over the f32 elements in row-major order."""
    bits = np.ascontiguousarray(weights).view(np.uint32).ravel().astype(np.uint64)
    odd = np.arange(bits.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return f"{int((bits * odd).sum(dtype=np.uint64)):016x}"


def is_quantized(name, special):
    stem = name.removesuffix(".weight")
    if name == "lm_head.weight":
        return special.get("head", False)
    return stem.endswith(("_proj", ".w1", ".w2", ".w3")) and not stem.endswith(
        tuple(special.get("plain", ["none"]))
    )


def case_make(name, out, seed):
    config, method, group, zeros, order, special = CASES[name]
    if "tie" in special:
        config = dict(config, tie_word_embeddings=special["tie"])
    rand = np.random.default_rng(seed)
    dtype = getattr(torch, config["torch_dtype"])
    tensors = experts_split(weights_random(AutoConfig.for_model(**config), seed), config)
    plain, stored, sums, order_of = {}, {}, {}, {}
    for key, x in tensors.items():
        stem = key.removesuffix(".weight")
        if not is_quantized(key, special):
            plain[key] = x.to(dtype).float()
            stored[key] = x.to(dtype)
            continue
        codes, zero, scale, g_idx = matrix_draw(rand, *x.shape, method, group, zeros, order)
        fused = stem.rpartition(".")[0], x.shape[1]  # what reads the same input has one order
        g_idx = order_of.setdefault(fused, g_idx)
        wide = scale.float().numpy()[:, g_idx]
        weights = (codes - zero[:, g_idx]).astype(np.float32) * wide
        plain[key] = torch.from_numpy(weights)
        sums[stem] = bits_sum(weights)
        for part, value in matrix_pack(method, codes, zero, scale, g_idx).items():
            stored[f"{stem}.{part}"] = value
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        beside = Path(temporary) / name
        beside.mkdir()
        (beside / "config.json").write_text(json.dumps(dict(config, torch_dtype="float32")))
        save_file(plain, beside / "model.safetensors", metadata={"format": "pt"})
        golden_write(beside, seed)
        golden = json.loads((beside / "golden.json").read_text())
        golden |= {"stored_dtype": config["torch_dtype"], "weights": sums}
        json_write(folder / "golden.json", golden)
        (folder / "golden.safetensors").write_bytes((beside / "golden.safetensors").read_bytes())
    quantized = config_quantized(config, method, group, zeros, order)
    (folder / "config.json").write_text(json.dumps(quantized, indent=2) + "\n")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    print(name, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    args = parser.parse_args()
    for i, name in enumerate(CASES):
        if name in args.only:
            case_make(name, args.out, 100 + i)


if __name__ == "__main__":
    main()
