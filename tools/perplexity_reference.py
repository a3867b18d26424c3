"""Perplexity of a Hugging Face folder on a text, computed by transformers in f32 on the CPU.

    python3 tools/perplexity_reference.py [--model models/demo] [--text models/demo/heldout.txt]

The rule, for whoever measures the same elsewhere: encode the text without special tokens; cut it
into consecutive chunks of --window - 1 tokens, the last one shorter; read every chunk on its own
behind one bos token; score every token of the chunk. Perplexity is exp(mean of -log p).
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def chunk_nll(model, bos, chunk):
    """Sum of -log p over a chunk, in nats."""
    logits = model(torch.tensor([[bos] + chunk])).logits[0, :-1].double()
    target = torch.tensor(chunk)
    return float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))


def perplexity(folder, text, window, dtype):
    """Returns (perplexity, scored tokens, nats a token)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks = [ids[at : at + window - 1] for at in range(0, len(ids), window - 1)]
    nats = sum(chunk_nll(model, tokenizer.bos_token_id, chunk) for chunk in chunks) / len(ids)
    return math.exp(nats), len(ids), nats


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--text", type=Path, default=Path("models/demo/heldout.txt"))
    parser.add_argument("--window", type=int, default=512, help="tokens of a chunk, bos included")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    value, n_tokens, nats = perplexity(args.model, text, args.window, getattr(torch, args.dtype))
    print(
        json.dumps(
            {
                "perplexity": round(value, 4),
                "nats_per_token": round(nats, 6),
                "tokens": n_tokens,
                "bytes": len(text.encode()),
                "bits_per_byte": round(nats * n_tokens / math.log(2) / len(text.encode()), 4),
                "window": args.window,
                "dtype": args.dtype,
            }
        )
    )


if __name__ == "__main__":
    main()
