"""Makes tests/golden: tiny random-weight checkpoints and what Hugging Face computes from them.

    python3 tools/make_golden.py --corpus DIR [--out tests/golden] [--only NAME ...]

Every expectation comes from reading the written files back with transformers on the CPU, so a
golden says what the reference makes of exactly those bytes. tests/golden/README.md describes the
formats. DIR holds public-domain books (*.md); the tokenizers are trained on one of them.
Made with torch 2.15.0, transformers 5.23.0, tokenizers 0.23.3.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import golden_sampling
import golden_tokenizers
from golden_models import MODELS, VARIANTS

PROMPT_LENGTHS = [1, 7, 33, 90]
N_GREEDY = 64
GAP_MIN = 0.01  # logits; a kernel summing in another order must not flip a greedy token
N_BEAMS, N_BEAM_TOKENS = 4, 24

SHARDED = "llama3"  # also written as llama3_sharded: two files and an index
ONLY_BF16 = {"qwen2_heads14"}  # to stay small
BEAMS = ("llama", "gpt2")


def weights_random(config, seed):
    """Random parameters by name: matrices N(0, 0.2), norms near 1, biases N(0, 0.1)."""
    model = AutoModelForCausalLM.from_config(config)
    rand = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, p in model.named_parameters():  # tied parameters appear once
        x = torch.randn(p.shape, generator=rand)
        if p.dim() >= 2:
            scale = 0.2
        else:
            scale = 0.1
        is_norm = p.dim() == 1 and name.endswith("weight")
        tensors[name] = (x * scale + (1.0 if is_norm else 0.0)).contiguous()
    return tensors


def experts_split(tensors, config):
    """Experts as checkpoints on the hub hold them: one matrix each, not one stack for all."""
    out = {}
    for name, x in tensors.items():
        stem = name.rpartition(".experts.")[0]
        if not stem:
            out[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if "num_local_experts" in config else name] = x
            continue
        mixtral = "num_local_experts" in config
        if mixtral:
            stem = stem.replace(".mlp", ".block_sparse_moe")
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        for e, matrix in enumerate(x):
            at = f"{stem}.experts.{e}."
            if name.endswith("down_proj"):
                out[at + down + ".weight"] = matrix.contiguous()
            else:
                half = matrix.shape[0] // 2
                out[at + gate + ".weight"] = matrix[:half].contiguous()
                out[at + up + ".weight"] = matrix[half:].contiguous()
    return out


def checkpoint_write(folder, config, tensors, dtype, prefix_drop=""):
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config, torch_dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {n.removeprefix(prefix_drop): t.to(dtype) for n, t in tensors.items()}
    tensors = experts_split(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def checkpoint_shard(folder, config, tensors):
    """Two shards cut in the middle of the layers, with config.json in the newer style."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    config["rope_parameters"] = dict(
        config.pop("rope_scaling"), rope_theta=config.pop("rope_theta")
    )
    del config["torch_dtype"]
    config["dtype"] = "bfloat16"
    tensors = {n: t.bfloat16() for n, t in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
    n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def model_load(folder, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


@torch.no_grad()
def greedy(model, ids):
    """Continues token by token; returns (tokens, top1-top2 gaps)."""
    tokens, gaps = [], []
    out = model(torch.tensor([ids]), use_cache=True)
    for _ in range(N_GREEDY):
        top = torch.topk(out.logits[0, -1].float(), 2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        out = model(
            torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True
        )
    return tokens, gaps


def prompt_find(model, length, vocab, rand):
    """A random prompt whose greedy continuation has healthy gaps and is not one long repetition."""
    for _ in range(2000):
        ids = rand.integers(3, vocab - 1, length).tolist()
        tokens, gaps = greedy(model, ids)
        if min(gaps) > GAP_MIN and len(set(tokens)) > 12:
            return ids, tokens, gaps
    raise SystemExit("no prompt found: lower GAP_MIN")


@torch.no_grad()
def golden_write(folder, seed):
    """golden.json and golden.safetensors for a checkpoint already in `folder`."""
    model = model_load(folder, torch.float32)
    stored = json.loads((folder / "config.json").read_text())
    stored_dtype = stored.get("torch_dtype", stored.get("dtype"))
    plain = model_load(folder, torch.bfloat16) if stored_dtype == "bfloat16" else None
    rand = np.random.default_rng(seed)
    prompts, tensors = [], {}
    for i, length in enumerate(PROMPT_LENGTHS):
        ids, tokens, gaps = prompt_find(model, length, model.config.vocab_size, rand)
        positions = sorted({0, length // 3, 2 * length // 3, length - 1})
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        tensors[f"prompt{i}.logits"] = logits[positions].contiguous()
        if plain:
            tensors[f"prompt{i}.logits_bf16"] = plain(torch.tensor([ids])).logits[0, -1].float()
        prompts.append(
            {
                "ids": ids,
                "positions": positions,
                "logits": f"prompt{i}.logits",
                "greedy": tokens,
                "gaps": [float(f"{g:.6g}") for g in gaps],
                "gap_min": float(f"{min(gaps):.6g}"),
            }
        )
    save_file(tensors, folder / "golden.safetensors")
    json_write(
        folder / "golden.json",
        {
            "model": folder.name,
            "stored_dtype": stored_dtype,
            "compute_dtype": "float32",
            "vocab_size": model.config.vocab_size,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prompts": prompts,
        },
    )


def json_write(path, value):
    """JSON with one line for each list of numbers."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(
        r"\[\s+([-0-9eE.,\s]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text
    )
    path.write_text(text + "\n", encoding="utf-8")


def beam_run(model, ids, eos):
    """All N_BEAMS hypotheses, best first, and their scores."""
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = 0
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=N_BEAMS,
        num_return_sequences=N_BEAMS,
        length_penalty=1.0,
        early_stopping=False,
        do_sample=False,
        max_new_tokens=N_BEAM_TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for row, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
        tokens = row[len(ids) :]
        if eos is not None and eos in tokens:
            tokens = tokens[: tokens.index(eos) + 1]
        beams.append({"tokens": tokens, "score": float(f"{score:.9g}")})
    return beams


def beam_case(model, length, with_eos, rand):
    """A prompt whose beams are clearly apart; with_eos, also one where some beams end early."""
    for _ in range(500):
        ids = rand.integers(3, model.config.vocab_size - 1, length).tolist()
        eos = None
        beams = beam_run(model, ids, None)
        if with_eos:
            eos = beams[int(rand.integers(N_BEAMS))]["tokens"][int(rand.integers(4, 14))]
            beams = beam_run(model, ids, eos)
            ended = [b["tokens"][-1] == eos for b in beams]
            lengths = [len(b["tokens"]) for b in beams]
            if not any(ended) or min(lengths) < 4 or len(set(lengths)) < 2:
                continue
        scores = [b["score"] for b in beams]
        if min(a - b for a, b in zip(scores, scores[1:])) > 2e-3:
            return {"ids": ids, "eos_token_id": eos, "beams": beams}
    raise SystemExit("no beam case found")


def beam_write(folder, seed):
    model = model_load(folder, torch.float32)
    rand = np.random.default_rng(seed)
    plan = [(7, False), (33, False), (7, True), (33, True), (12, True)]
    json_write(
        folder / "beam.json",
        {
            "num_beams": N_BEAMS,
            "length_penalty": 1.0,
            "early_stopping": False,
            "max_new_tokens": N_BEAM_TOKENS,
            "cases": [beam_case(model, n, e, rand) for n, e in plan],
        },
    )


def model_make(name, out, texts, seed):
    config = MODELS[name]
    folder = out / name
    tensors = weights_random(AutoConfig.for_model(**config), seed)
    checkpoint_write(
        folder, config, tensors, torch.bfloat16 if name in ONLY_BF16 else torch.float32
    )
    golden_write(folder, seed)
    if name in BEAMS:
        beam_write(folder, seed)
    if name not in ONLY_BF16:
        prefix = "transformer." if name == "gpt2" else ""
        checkpoint_write(out / (name + "_bf16"), config, tensors, torch.bfloat16, prefix)
        golden_write(out / (name + "_bf16"), seed + 1)
    if name == SHARDED:
        checkpoint_shard(out / (name + "_sharded"), config, tensors)
        golden_write(out / (name + "_sharded"), seed)
    golden_tokenizers.tokenizer_write(name, folder, config["vocab_size"], texts)
    for path in out.glob(name + "*/*"):
        path.chmod(0o644)  # save_file leaves files to the owner alone
    print(name, "done", flush=True)


def variant_make(name, out, seed):
    config = VARIANTS[name]
    checkpoint_write(
        out / name, config, weights_random(AutoConfig.for_model(**config), seed), torch.float32
    )
    golden_write(out / name, seed)
    for path in out.glob(name + "/*"):
        path.chmod(0o644)
    print(name, "done", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("--only", nargs="*", default=[*MODELS, *VARIANTS, "sampling"])
    parser.add_argument("--seed", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    texts = golden_tokenizers.texts_read(args.corpus)
    for i, name in enumerate(MODELS):
        if name in args.only:
            model_make(name, args.out, texts, args.seed + 10 * i)
    for i, name in enumerate(VARIANTS):
        if name in args.only:
            variant_make(name, args.out, args.seed + 500 + 10 * i)
    if "sampling" in args.only:
        golden_sampling.sampling_write(args.out / "sampling.json")


if __name__ == "__main__":
    main()
